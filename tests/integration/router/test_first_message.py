"""What a request's first message waits for in the router, and what it does not."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from services.router.attempt import Attempt
from services.router.dispatch import Dispatcher
from services.router.messages import EventWriter
from services.router.money.hold import Hold
from services.router.money.line import Line
from services.router.serving import Serving
from tests.router_harness import MODEL, RouterHarness
from tidemill.api.router.v1 import router_service_pb2 as router_pb2

pytestmark = pytest.mark.redis

SHORT, LONG = "x" * 100, "x" * 1000


def ask(request_id: str, prompt: str = SHORT) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, prompt=prompt)


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
    assert steps[:4] == ["placed", "held", "attempt", "message"]
    before_placing = order[: order.index("placed")]
    assert before_placing == ["ledger asked"]  # the hold is on its way


async def test_a_first_message_does_not_wait_for_its_checkpoint(
    router: RouterHarness, order: list[str]
) -> None:
    await router.generate(ask("r1"))
    assert order.index("message") < order.index("checkpoint")
