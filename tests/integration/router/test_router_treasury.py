"""Money as a router's clients see it, with a ledger of its own for each test."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from services.router.money import cashier
from services.router.money.spool import Spool
from tests.redis_process import RedisProcess
from tests.router_harness import (
    ADMIN_KEY,
    DURABLE,
    MODEL,
    OPENING_NANO,
    Heard,
    RouterHarness,
    bearer,
    listen,
)
from tests.scripted_worker import Script, ScriptedWorker, Talk
from tidemill.api.billing.v1 import billing_service_pb2 as billing_pb2
from tidemill.api.billing.v1 import receipt_pb2
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing import ledger as rules
from tidemill.errors import AlreadyExists, InsufficientBalance, LedgerUnavailable

pytestmark = pytest.mark.redis

PENDING, SETTLED = receipt_pb2.RECEIPT_STATE_PENDING, receipt_pb2.RECEIPT_STATE_SETTLED


@pytest.fixture
def ledger_redis(redis_server: Callable[..., RedisProcess]) -> RedisProcess:
    return redis_server(**DURABLE)


def ask(
    request_id: str = "r1", *, max_tokens: int = 8, **fields: Any
) -> router_pb2.GenerateRequest:
    sampling = sampling_pb2.Sampling(max_tokens=max_tokens)
    return router_pb2.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="x" * 100, sampling=sampling, **fields
    )


def gated(gate: asyncio.Event) -> Script:
    """Two tokens, and the rest once the gate is open."""

    async def play(talk: Talk) -> None:
        await talk.prefill_done(70, host=64)
        await talk.tokens([71])
        await gate.wait()
        await talk.tokens([72] * (talk.sampling.max_tokens - 2))
        await talk.final("LENGTH")

    return play


async def as_funded(talk: Talk) -> None:
    """Generates as a worker does: to the last funded token, with as much patience for more."""
    await talk.prefill_done(70)
    while talk.generated < talk.sampling.max_tokens:
        if (left := _left(talk)) > 0:
            await talk.tokens([71] * min(16, left))
            await asyncio.sleep(0.005)
            continue
        await asyncio.sleep(2.0)
        if _left(talk) <= 0:
            await talk.final("BUDGET")
            return
    await talk.final("LENGTH")


def _left(talk: Talk) -> int:
    most: int = talk.sampling.max_tokens
    return min(most, most if talk.funded is None else talk.funded) - talk.generated


async def account(router: RouterHarness, tenant_id: str = "acme") -> rules.Account:
    """The account, whose books must be in order."""
    found = await router.process.money.accounts.read(tenant_id)
    assert rules.check(found) == []
    return found


async def paid_in(router: RouterHarness, tenant_id: str, amount_nano: int) -> str:
    """A key of a new tenant with just so much money."""
    tenant = admin_pb2.CreateTenantRequest(tenant_id=tenant_id, currency="USD")
    admin = bearer(ADMIN_KEY)
    await router.admin.CreateTenant(tenant, metadata=admin)
    top_up = admin_pb2.TopUpRequest(
        tenant_id=tenant_id, operation_id="opening", amount_nano=amount_nano
    )
    await router.admin.TopUp(top_up, metadata=admin)
    key = admin_pb2.CreateKeyRequest(tenant_id=tenant_id, label="test")
    return str((await router.admin.CreateKey(key, metadata=admin)).key)


async def receipt(router: RouterHarness, request_id: str) -> receipt_pb2.Receipt:
    request = billing_pb2.GetReceiptRequest(request_id=request_id)
    answer = await router.billing.GetReceipt(request, metadata=bearer(router.key))
    found: receipt_pb2.Receipt = answer.receipt
    return found


async def settled_receipt(router: RouterHarness, request_id: str) -> receipt_pb2.Receipt:
    """The receipt once it is in the ledger."""
    async with asyncio.timeout(30):
        while (found := await receipt(router, request_id)).state != SETTLED:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return found


async def first_chunk(call: Any) -> None:
    while not (await call.read()).HasField("chunk"):
        pass


async def test_a_ledger_that_dies_mid_stream_leaves_a_pending_receipt_that_is_settled_once(
    router: RouterHarness, decode: ScriptedWorker, ledger: RedisProcess
) -> None:
    gate = asyncio.Event()
    decode.scripts = [gated(gate)]
    call = router.call(ask())
    await first_chunk(call)
    ledger.kill()
    gate.set()
    heard = await listen(call)
    bill = heard.completed.receipt
    assert (bill.state, bill.position) == (PENDING, 0)
    assert len(bill.signature) == 64
    assert heard.completed.usage.completion_tokens == 8
    await router.until(lambda: [each.attempt for each in decode.acknowledged] == [1])
    await router.until(lambda: not router.process.ready)

    again = await router.generate(ask("r2"))
    assert isinstance(again.error, LedgerUnavailable)
    assert again.error.retry_after_s

    ledger.start()
    await router.until(lambda: router.process.ready)
    settled = await settled_receipt(router, "r1")
    assert settled.content_sha256 == bill.content_sha256
    repeated = (await router.generate(ask())).completed
    assert repeated.HasField("text_replayed")
    assert not repeated.text_replayed
    assert repeated.receipt == settled
    books = await account(router)
    assert books.position == 1
    assert books.balance == rules.Balance(0, OPENING_NANO - bill.amount_nano, 0)


async def test_of_200_streams_at_once_as_many_run_as_the_balance_pays_for(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    one = (await router.generate(ask())).completed.receipt.hold_nano
    key = await paid_in(router, "busy", 20 * one)
    gate = asyncio.Event()
    decode.scripts = [gated(gate)]
    streams = [
        asyncio.create_task(router.generate(ask(f"r{index}"), key=key)) for index in range(200)
    ]
    await router.until(lambda: sum(each.done() for each in streams) == 180, timeout_s=30)
    assert (await account(router, "busy")).balance == rules.Balance(0, 0, 20 * one)
    gate.set()
    heard = await asyncio.gather(*streams)
    refused = [each for each in heard if isinstance(each.error, InsufficientBalance)]
    served = [each for each in heard if each.error is None]
    assert (len(refused), len(served)) == (180, 20)
    assert not any(each.messages for each in refused)
    books = await account(router, "busy")
    assert books.balances["revenue"] == sum(_amount(each) for each in served)
    assert books.position == 20


async def test_generation_ends_with_budget_at_the_last_token_that_max_cost_pays_for(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [as_funded]
    twenty = (await router.generate(ask("size", max_tokens=20))).completed.receipt.hold_nano
    cost = router_pb2.MaxCost(currency="USD", nano=twenty)
    done = (await router.generate(ask("r1", max_tokens=500, max_cost=cost))).completed
    assert done.finish_reason == lifecycle_pb2.FINISH_REASON_BUDGET
    assert done.usage.completion_tokens == 20
    assert done.receipt.amount_nano <= twenty


async def test_a_hold_grows_while_the_stream_goes_on_until_the_balance_ends_it(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [as_funded]
    hold = (await router.generate(ask("size", max_tokens=700))).completed.receipt.hold_nano
    key = await paid_in(router, "small", hold)
    done = (await router.generate(ask(max_tokens=900), key=key)).completed
    assert done.finish_reason == lifecycle_pb2.FINISH_REASON_BUDGET
    assert done.usage.completion_tokens == 700
    assert done.receipt.hold_nano == hold
    books = await account(router, "small")
    assert books.balance.topped_up_nano == hold - done.receipt.amount_nano


async def test_money_paid_in_meanwhile_carries_a_stream_to_its_end(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [as_funded]
    hold = (await router.generate(ask("size", max_tokens=520))).completed.receipt.hold_nano
    key = await paid_in(router, "later", hold)
    call = router.call(ask(max_tokens=900), key=key)
    await first_chunk(call)
    command = rules.Grant(operation_id="more", now_ms=1, amount_nano=10**9)
    await router.process.money.accounts.grant("later", command)
    done = (await listen(call)).completed
    assert done.finish_reason == lifecycle_pb2.FINISH_REASON_LENGTH
    assert done.usage.completion_tokens == 900


async def test_a_worker_keeps_its_final_while_the_bill_is_stored_nowhere(
    router: RouterHarness,
    decode: ScriptedWorker,
    ledger: RedisProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Spool, record: bytes) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(cashier, "_STORE_PATIENCE_S", 0.2)
    monkeypatch.setattr(Spool, "append", full)
    gate = asyncio.Event()
    decode.scripts = [gated(gate)]
    call = router.call(ask())
    await first_chunk(call)
    ledger.kill()
    gate.set()
    heard = await listen(call)
    assert heard.error is not None
    assert heard.error.reason == "SETTLEMENT_UNSTORED"
    assert not decode.acknowledged
    worker = router.process.fleet.get(decode.worker_id)
    assert worker is not None
    assert worker.open_attempts.count == 0, "a worker that drains may leave"
    monkeypatch.undo()
    ledger.start()
    await router.until(lambda: router.process.ready)
    await settled_receipt(router, "r1")
    assert (await account(router)).position == 1


async def test_an_id_settled_for_one_body_is_refused_for_another(router: RouterHarness) -> None:
    assert (await router.generate(ask())).completed.receipt.state == SETTLED
    other = await router.generate(ask(max_tokens=9))
    assert isinstance(other.error, AlreadyExists)


async def test_holds_are_counted_while_they_are_open(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    gate = asyncio.Event()
    decode.scripts = [gated(gate)]
    call = router.call(ask())
    await first_chunk(call)
    assert router.metric("tidemill_router_holds", state="open") == 1
    gate.set()
    await listen(call)
    assert router.metric("tidemill_router_holds", state="open") == 0
    assert router.metric("tidemill_router_settlements_total", outcome="settled") == 1


def _amount(heard: Heard) -> int:
    return int(heard.completed.receipt.amount_nano)
