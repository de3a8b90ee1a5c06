"""What a request's first message waits for in the router, and what it does not."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from services.router.attempt import Attempt, OpenCall
from services.router.dispatch import Dispatcher
from services.router.messages import EventWriter
from services.router.money.hold import Hold
from services.router.money.line import Line
from services.router.serving import Serving
from tests.redis_process import RedisProcess
from tests.router_harness import ADMIN_KEY, MODEL, RouterHarness, bearer
from tests.scripted_worker import ScriptedWorker
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2

pytestmark = pytest.mark.redis

SHORT, LONG = "x" * 100, "x" * 1000


def ask(
    request_id: str, prompt: str = SHORT, max_tokens: int | None = None
) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        prompt=prompt,
        sampling=sampling_pb2.Sampling(max_tokens=max_tokens),
    )


async def test_a_short_prompt_does_not_wait_for_threads_that_read_long_ones(
    router: RouterHarness,
) -> None:
    pool, free = router.process._pool, threading.Event()
    busy = [pool.submit(free.wait) for _ in range(pool._max_workers)]
    try:
        long = asyncio.create_task(router.generate(ask("long", LONG)))
        assert (await router.generate(ask("short"))).completed.receipt.amount_nano > 0
        assert not long.done()
    finally:
        free.set()
    assert (await long).completed.usage.cache_miss_tokens == len(LONG)
    assert all(each.result() for each in busy)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what happens, one after the other."""
    happened: list[str] = []

    def note(owner: type, method: str, name: Callable[..., str]) -> None:
        real = getattr(owner, method)

        def noting(*arguments: Any, **options: Any) -> Any:
            happened.append(name(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, method, noting)

    note(Line, "ask", lambda *_: "ledger asked")
    note(Dispatcher, "_place", lambda *_: "placed")
    note(Hold, "__init__", lambda *_: "held")
    note(OpenCall, "__init__", lambda *_: "called")
    note(Attempt, "__init__", lambda *_: "attempt")
    note(EventWriter, "_chunk", lambda *_: "message")
    note(Serving, "progress", lambda *_: "checkpoint")
    return happened


async def test_placing_goes_on_while_the_ledger_answers_and_nothing_begins_before_it_has(
    router: RouterHarness, order: list[str]
) -> None:
    await router.generate(ask("warm"))  # scripts loaded, key read
    order.clear()
    await router.generate(ask("r1"))
    steps = [each for each in order if each != "ledger asked"]
    assert steps[:5] == ["placed", "called", "held", "attempt", "message"]
    before_placing = order[: order.index("placed")]
    assert before_placing == ["ledger asked"]  # the hold is on its way


async def test_a_first_message_does_not_wait_for_its_checkpoint(
    router: RouterHarness, order: list[str]
) -> None:
    await router.generate(ask("r1"))
    assert order.index("message") < order.index("checkpoint")


async def poor(router: RouterHarness, *, pays_for: str | None) -> str:
    """A tenant's key; what it paid in is all used up, if need be by one request."""
    tenant = admin_pb2.CreateTenantRequest(tenant_id="poor", currency="USD")
    await router.admin.CreateTenant(tenant, metadata=bearer(ADMIN_KEY))
    if pays_for is not None:
        top_up = admin_pb2.TopUpRequest(tenant_id="poor", operation_id="t", amount_nano=100_000)
        await router.admin.TopUp(top_up, metadata=bearer(ADMIN_KEY))
    made = await router.admin.CreateKey(
        admin_pb2.CreateKeyRequest(tenant_id="poor", label="test"), metadata=bearer(ADMIN_KEY)
    )
    key = str(made.key)
    if pays_for is not None:
        assert (await router.generate(ask(pays_for, max_tokens=5), key=key)).error is None
    return key


async def test_a_call_that_was_opened_for_a_refused_request_is_closed_and_was_nothing(
    router: RouterHarness, decode: ScriptedWorker
) -> None:
    key = await poor(router, pays_for="r1")
    heard = await router.generate(ask("r2", max_tokens=4096), key=key)
    assert heard.error is not None
    assert heard.error.reason == "INSUFFICIENT_BALANCE"
    await router.until(lambda: decode.closed_before_start == 1)
    await router.check_idle()
    assert len(decode.starts) == 1
    assert decode.running == 0
    # Once refused, the next is called for only when it is paid for.
    assert (await router.generate(ask("r3", max_tokens=4096), key=key)).error is not None
    assert (await router.generate(ask("r4"))).error is None
    assert decode.closed_before_start == 1


async def test_a_tenant_that_was_never_let_in_costs_no_worker_a_call(
    router: RouterHarness, order: list[str]
) -> None:
    key = await poor(router, pays_for=None)
    assert (await router.generate(ask("r1"), key=key)).error is not None
    assert "called" not in order


async def test_a_client_that_goes_away_while_money_is_held_leaves_no_call_open(
    router: RouterHarness, decode: ScriptedWorker, ledger: RedisProcess, order: list[str]
) -> None:
    await router.generate(ask("warm"))
    order.clear()
    with ledger.frozen():
        call = router.call(ask("r1"))
        await router.until(lambda: "called" in order)
        call.cancel()
        await router.until(lambda: decode.closed_before_start == 1)
    await router.check_idle()
    assert len(decode.starts) == 1
