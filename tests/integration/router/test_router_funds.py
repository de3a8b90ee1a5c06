"""What a request is paid from while it runs: its hold, as it is, as it grows and as it ends."""

import asyncio
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import (
    ADMIN_KEY,
    MODEL,
    ONE_PRICE_PATH,
    OPENING_NANO,
    RouterHarness,
    bearer,
    listen,
    router_config,
    running_router,
    scripted,
    spell,
)
from tests.scripted_worker import Script, ScriptedWorker, Talk, answer
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing.ledger import Balance, State
from tidemill.errors import WorkerLost
from tidemill.policy.seeds import choice_seed
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

BUDGET = lifecycle_pb2.FINISH_REASON_BUDGET
LENGTH = lifecycle_pb2.FINISH_REASON_LENGTH
MISS_NANO, OUTPUT_NANO = 270, 1100  # a token, of the only window
NUM_PROMPT = 100
STEP = 512
MOST = 800
IDS = [50 + number % 100 for number in range(MOST)]


@pytest.fixture
def price_book() -> Path:
    return ONE_PRICE_PATH


def ask(request_id: str = "r1", n: int = 1, max_tokens: int = MOST) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        prompt="x" * NUM_PROMPT,
        sampling=sampling_pb2.Sampling(max_tokens=max_tokens, n=n, seed=1),
    )


def costs(num_tokens: int) -> int:
    return NUM_PROMPT * MISS_NANO + num_tokens * OUTPUT_NANO


def paid(
    ids: Sequence[int] = IDS, *, until: int | None = None, wait_s: float = 2.0, pause_s: float = 0.0
) -> Script:
    """Generates as far as it is paid for, as a worker does; dies after `until` tokens."""

    async def play(talk: Talk) -> None:
        begin, choices = talk.start.relayed_tokens, range(talk.sampling.n)
        await talk.prefill_done(*[ids[begin]] * talk.sampling.n)
        for position in range(begin + 1, talk.sampling.max_tokens):
            if position == until:
                raise WorkerLost("gone")
            if talk.stopped.done():
                reason = lifecycle_pb2.FinishReason.Name(talk.stopped.result().reason)
                return await end(talk, reason.removeprefix("FINISH_REASON_"))
            if not await funded(talk, begin + talk.generated + len(choices)):
                return await end(talk, "BUDGET")
            for choice in choices:
                await talk.tokens([ids[position]], choice=choice)
            await asyncio.sleep(pause_s)
        return await end(talk, "LENGTH")

    async def funded(talk: Talk, tokens: int) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while talk.funded is not None and talk.funded < tokens:  # noqa: ASYNC110 - a script
                    await asyncio.sleep(0.01)
        return talk.funded is None or talk.funded >= tokens

    async def end(talk: Talk, reason: str) -> None:
        for choice in range(talk.sampling.n if talk.sampling.n > 1 else 0):
            await talk.choice_ended(choice, reason)
        await talk.final(reason)

    return play


async def tenant_with(router: RouterHarness, nano: int, name: str = "poor") -> str:
    """A key of a tenant with so much money."""
    admin, metadata = router.admin, bearer(ADMIN_KEY)
    tenant = admin_pb2.CreateTenantRequest(tenant_id=name, currency="USD")
    await admin.CreateTenant(tenant, metadata=metadata)
    await top_up(router, nano, name)
    key = admin_pb2.CreateKeyRequest(tenant_id=name, label="test")
    return str((await admin.CreateKey(key, metadata=metadata)).key)


async def top_up(router: RouterHarness, nano: int, name: str = "poor") -> None:
    operation = f"paid-{nano}"
    paid_in = admin_pb2.TopUpRequest(tenant_id=name, operation_id=operation, amount_nano=nano)
    await router.admin.TopUp(paid_in, metadata=bearer(ADMIN_KEY))


async def balance(router: RouterHarness, name: str = "acme") -> Balance:
    return await router.process.money.accounts.balance(name)


async def journal(router: RouterHarness, name: str = "acme") -> list[Any]:
    """Kind, subject and detail of each entry, openings left out."""
    account = await router.process.money.accounts.read(name)
    return [entry for entry in account.journal if entry.kind in {"settle", "release"}]


async def test_a_request_that_the_balance_does_not_cover_reaches_no_worker(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    key = await tenant_with(router, costs(STEP) - 1)
    heard = await router.generate(ask(), key=key)
    assert heard.messages == []
    assert heard.error is not None
    assert (heard.error.code, heard.error.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "INSUFFICIENT_BALANCE",
    )
    assert decode.starts == []
    await router.check_idle()
    await top_up(router, costs(MOST))
    decode.scripts = [paid()]
    assert (await router.generate(ask(), key=key)).completed.finish_reason == LENGTH


async def test_money_is_held_while_a_request_runs_and_charged_once_after(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [paid(pause_s=0.005)]
    call = router.call(ask(max_tokens=50))
    await call.read()
    held = await balance(router)
    assert held.held_nano == costs(50)
    assert held.topped_up_nano == OPENING_NANO - costs(50)
    amount = (await listen(call)).completed.receipt.amount_nano
    assert amount == costs(50)
    assert await balance(router) == Balance(0, OPENING_NANO - amount, 0)
    assert [(entry.kind, entry.subject) for entry in await journal(router)] == [("settle", "r1")]


async def test_the_budget_ends_what_is_not_paid_for(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    key = await tenant_with(router, costs(STEP + 80))
    decode.scripts = [paid()]
    heard = await router.generate(ask(), key=key)
    assert heard.completed.finish_reason == BUDGET
    assert decode.starts[0].funded_tokens == STEP
    assert heard.completed.usage.completion_tokens == len(heard.token_ids) == STEP + 80
    assert await balance(router, "poor") == Balance(0, 0, 0)


@pytest.mark.parametrize("when", ["before half is used", "while it stands still"])
async def test_money_that_comes_in_time_lets_it_go_on(
    router: RouterHarness, decode: ScriptedWorker, when: str
) -> None:
    key = await tenant_with(router, costs(STEP + 80))
    decode.scripts = [paid(wait_s=5.0)]
    call = router.call(ask(), key=key)
    await call.read()
    if when == "while it stands still":
        await router.until(lambda: len(decode.starts) == 1)
        await asyncio.sleep(1.0)
    await top_up(router, costs(MOST))
    heard = await listen(call)
    assert heard.completed.finish_reason == LENGTH
    assert heard.token_ids == IDS
    left = costs(STEP + 80) + costs(MOST) - heard.completed.receipt.amount_nano
    assert await balance(router, "poor") == Balance(0, left, 0)


async def test_a_worker_that_runs_past_what_is_paid_for_does_it_at_our_cost(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    key = await tenant_with(router, costs(STEP))
    decode.scripts = [answer(IDS)]
    usage = (await router.generate(ask(), key=key)).completed.usage
    assert usage.completion_tokens == STEP
    assert usage.unbilled.overrun_tokens == MOST - STEP
    assert await balance(router, "poor") == Balance(0, 0, 0)


async def test_without_the_ledger_no_request_runs_and_none_keeps_its_place(
    model_dir: Path, redis_server: Callable[..., RedisProcess], tls_files: Callable[[str], TlsFiles]
) -> None:
    ledger = redis_server(maxmemory_policy="noeviction", appendonly="yes", appendfsync="always")
    workers = [ScriptedWorker("p", "prefill"), ScriptedWorker("d", "decode", answer([50, 51]))]
    async with scripted(workers, tls_files) as endpoints:
        config = router_config(
            model_dir, ledger, endpoints, tls_files("router"), ledger_timeout_s=1.0
        )
        async with running_router(config) as router:
            assert (await router.generate(ask("warm"))).error is None
            with ledger.frozen():
                call = router.call(ask("impatient"))
                await asyncio.sleep(0.2)
                call.cancel()
                heard = await router.generate(ask("patient"))
                assert heard.error is not None
                assert heard.error.reason == "LEDGER_UNAVAILABLE"
                await router.until(lambda: len(router.process.requests) == 0)
            await router.check_idle()
            assert [start.task.id.request_id for start in workers[1].starts] == ["acme:warm"]


async def test_a_cancel_that_comes_before_the_money_reaches_no_worker(
    router: RouterHarness, decode: ScriptedWorker, ledger: RedisProcess
) -> None:
    decode.scripts = [paid()]
    assert (await router.generate(ask("warm", max_tokens=3))).error is None
    with ledger.frozen():
        call = router.call(ask())
        await router.until(lambda: bool(router.process.requests.running()))
        assert await router.cancel("r1")
    heard = await listen(call)
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_CANCELLED
    assert heard.completed.receipt.amount_nano == 0
    assert len(decode.starts) == 1
    assert (await balance(router)).held_nano == 0


async def test_a_client_that_goes_away_while_money_is_held_leaves_no_hold(
    router: RouterHarness, decode: ScriptedWorker, ledger: RedisProcess
) -> None:
    decode.scripts = [paid()]
    assert (await router.generate(ask("warm", max_tokens=3))).error is None
    requests, accounts = router.process.requests, router.process.money.accounts
    with ledger.frozen():
        call = router.call(ask())
        await router.until(lambda: bool(requests.running()))
        call.cancel()
        await router.until(lambda: not len(requests))
    await router.check_idle()
    held = await accounts.request("acme", "r1")
    assert held is not None
    assert held.state is State.RELEASED
    assert (await balance(router)).held_nano == 0
    assert len(decode.starts) == 1


async def test_a_request_that_another_router_has_taken_over_ends_here_without_a_bill(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    decode.scripts = [paid(pause_s=0.01)]
    call = router.call(ask())
    while not (await call.read()).HasField("chunk"):
        pass
    (generation,) = router.process.requests.running()
    generation._hold.lose()
    heard = await listen(call)
    assert heard.error is not None
    assert (heard.error.code, heard.error.reason) == (grpc.StatusCode.ABORTED, "STALE_FENCE")
    await router.until(lambda: decode.running == 0)
    assert [stop.reason for stop in decode.stops] == [lifecycle_pb2.FINISH_REASON_SERVER_FAULT]
    assert router.metric("tidemill_router_revenue_nano_total", model=MODEL, currency="USD") == 0


class TestFailover:
    @pytest.fixture
    def decode(self) -> ScriptedWorker:
        return ScriptedWorker("decode-0", "decode")

    async def test_there_is_one_charge_for_all_attempts(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        decode.scripts = [paid(until=7), paid()]
        completed = (await router.generate(ask(max_tokens=50))).completed
        assert completed.receipt.attempts == 2
        assert completed.receipt.amount_nano == costs(50)
        assert await balance(router) == Balance(0, OPENING_NANO - costs(50), 0)
        (entry,) = await journal(router)
        record = json.loads(entry.detail)
        assert (entry.kind, record["attempts"]) == ("settle", 2)
        assert [part["phase"] for part in record["busy"]].count("prefill") == 2
        fences = {start.task.id.fence for start in decode.starts}
        assert len(fences) == 1
        await router.until(lambda: len(decode.acknowledged) == 1)

    async def test_a_request_that_fails_frees_all_its_money_and_says_what_was_lost(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        async def play(talk: Talk) -> None:
            await talk.prefill_done(50)
            await talk.tokens([51, 52])
            await asyncio.sleep(60)

        decode.scripts = [play]
        call = router.call(ask())
        read = 0
        while read < 3:
            read += len((await call.read()).chunk.token_ids)
        await decode.vanish()
        heard = await listen(call)
        assert isinstance(heard.error, WorkerLost)
        assert await balance(router) == Balance(0, OPENING_NANO, 0)
        (entry,) = await journal(router)
        detail = json.loads(entry.detail)
        assert (entry.kind, detail["reason"]) == ("release", "WORKER_LOST")
        assert detail["unbilled"]["lost"] == 3

    async def test_a_later_attempt_has_what_is_left_of_the_funds(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        key = await tenant_with(router, costs(STEP))
        decode.scripts = [paid(until=300), paid()]
        heard = await router.generate(ask(), key=key)
        assert [start.funded_tokens for start in decode.starts] == [STEP, STEP]
        assert decode.starts[1].relayed_tokens == 300
        assert heard.completed.finish_reason == BUDGET
        assert heard.token_ids == IDS[:STEP]
        assert await balance(router, "poor") == Balance(0, 0, 0)

    async def test_choices_that_go_on_alone_never_come_to_more_than_is_paid_for(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        key = await tenant_with(router, costs(STEP))
        decode.scripts = [paid(until=100), paid()]
        heard = await router.generate(ask(n=3), key=key)
        assert heard.completed.finish_reason == BUDGET
        usage = heard.completed.usage
        assert usage.completion_tokens == usage.generated_tokens <= STEP
        assert usage.completion_tokens > STEP - 3
        funded = [start.funded_tokens for start in decode.starts]
        assert funded[0] == STEP
        assert sum(funded[1:]) == STEP
        assert len(decode.starts) == 4

    async def test_what_a_choice_that_ended_leaves_over_is_for_those_that_go_on(
        self, router: RouterHarness, decode: ScriptedWorker
    ) -> None:
        key = await tenant_with(router, costs(STEP))

        async def ends_early(talk: Talk) -> None:
            await talk.prefill_done(IDS[100])
            await talk.tokens(IDS[101:150])
            await asyncio.sleep(0.3)
            await talk.final("STOP")

        async def play(talk: Talk) -> None:
            first = talk.sampling.seed == choice_seed(1, 0)
            await (ends_early if first else paid(wait_s=2.0))(talk)

        decode.scripts = [paid(until=100), play]
        heard = await router.generate(ask(n=2), key=key)
        ends = [each.choice_end for each in heard.messages if each.HasField("choice_end")]
        assert {end.choice: end.completion_tokens for end in ends} == {0: 150, 1: STEP - 150}
        assert heard.completed.finish_reason == BUDGET


async def test_a_hold_for_text_is_that_of_its_tokens(
    router: RouterHarness, decode: ScriptedWorker, model_dir: Path
) -> None:
    assert len(spell(model_dir, "x" * NUM_PROMPT)) == NUM_PROMPT
    decode.scripts = [answer(IDS[:3])]
    completed = (await router.generate(ask(max_tokens=3))).completed
    assert completed.receipt.hold_nano == costs(3)
