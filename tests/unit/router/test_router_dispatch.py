"""When the dispatcher looks for room again."""

import asyncio
import random
from typing import Any, cast

import pytest

from services.router.dispatch import Dispatcher
from services.router.fleet import DECODE, PREFILL, Description, Expected, Fleet, Worker
from services.router.ticket import Ticket
from tidemill.policy import BalancerConfig, QueueLimits, WorkerLoad

PACE = 10_000  # tokens a second


async def test_room_that_comes_between_two_reports_is_found_by_the_workers_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is heard any more, so the dispatcher must know by itself when to look."""
    monkeypatch.setattr("services.router.dispatch._POLL_S", 3600.0)
    clock = asyncio.get_running_loop().time
    fleet = Fleet({"tiny": Expected(512)}, clock, stale_after_s=1e9)
    dispatcher = Dispatcher(
        "tiny",
        fleet,
        limits=QueueLimits(),
        balancer=BalancerConfig(stale_after_s=1e9),
        rng=random.Random(1),
        clock=clock,
    )
    description = Description(
        worker_id="w",
        epoch=1,
        address="w:7000",
        roles=frozenset((PREFILL, DECODE)),
        model="tiny",
        digest=b"d" * 32,
        kv_format="f",
        context_tokens=4096,
        vocab_size=512,
    )
    worker = Worker(description, cast(Any, None))
    fleet.join(worker)
    busy = WorkerLoad(
        worker_id="w",
        epoch=1,
        sequence=1,
        observed_at=clock(),
        queued_uncached_tokens=PACE,
        prefill_tokens_per_s=PACE,
        free_blocks=1000,
        total_blocks=1000,
    )
    fleet.report(worker, busy)
    ticket = Ticket(
        key="q1",
        tenant_id="alice",
        num_prompt_tokens=100,
        max_tokens=8,
        block_hashes=[],
        moved=lambda *_: None,
        placed=asyncio.get_running_loop().create_future(),
    )
    running = asyncio.create_task(dispatcher.run())
    try:
        dispatcher.enqueue(ticket)
        async with asyncio.timeout(30):
            assert await ticket.placed is not None
        assert clock() >= busy.observed_at + 1 - 512 / PACE
    finally:
        running.cancel()
        await asyncio.wait([running])
