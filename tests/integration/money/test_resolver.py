import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from services.router.finish import Completed
from services.router.money import record, retained
from services.router.money.hold import Hold
from tests.money_desk import (
    LEASE_S,
    Desk,
    KeptFinals,
    desk,
    eventually,
    kept_final,
    progress,
    settle,
    system_ms,
    usage,
)
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tidemill.billing import BusyPart
from tidemill.billing import ledger as rules
from tidemill.errors import Cancelled, RequestInProgress

pytestmark = pytest.mark.redis


@pytest.fixture
def server(redis_server: Callable[..., RedisProcess]) -> RedisProcess:
    return redis_server(**DURABLE)


async def vanished(
    server: RedisProcess, folder: Path, *, tokens: int | None, lease_s: float = LEASE_S
) -> Hold:
    """A hold whose router is no more, with a checkpoint at so many tokens, or None."""
    async with desk(server, folder, resolving=False, lease_s=lease_s) as gone:
        await gone.top_up(10**9)
        hold = await gone.hold("r1")
        if tokens is not None:
            hold.checkpoint(lambda: progress(tokens))
            await gone.tasks.join(1.0)
    return hold


async def settled(own: Desk) -> record.Record:
    await own.until("r1", rules.State.SETTLED)
    account = await own.account()
    assert account.balance.held_nano == 0
    posted = account.requests["r1"].posted
    assert posted is not None
    return record.settled(posted)


async def test_the_final_that_a_worker_kept_is_billed_and_acknowledged(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    worker = KeptFinals(kept_final(hold, 30))
    async with desk(server, tmp_path, workers=[worker]) as own:
        kept = await settled(own)
        found = kept.completed
        assert list(kept.busy) == [
            BusyPart("p1", "prefill", 500_000, 1),
            BusyPart("d1", "decode", 250_000, 2),
        ]
        assert found.usage.completion_tokens == found.usage.generated_tokens == 30
        assert found.usage.cache_hit_tokens == 64
        assert found.finish.name == "CANCELLED"
        assert found.receipt.hold_nano >= found.receipt.charge.amount_nano
        assert [each.attempt for each in worker.acknowledged] == [1]
        assert own.metric("tidemill_router_resolutions_total", known_from="final") == 1


async def test_a_final_is_enough_without_a_checkpoint(server: RedisProcess, tmp_path: Path) -> None:
    hold = await vanished(server, tmp_path, tokens=None)
    async with desk(server, tmp_path, workers=[KeptFinals(kept_final(hold, 30))]) as own:
        assert (await settled(own)).completed.usage.completion_tokens == 30


async def test_the_checkpoint_is_billed_when_no_final_turns_up_within_two_leases(
    server: RedisProcess, tmp_path: Path
) -> None:
    await vanished(server, tmp_path, tokens=5)
    async with desk(server, tmp_path, workers=[KeptFinals()]) as own:
        await own.until("r1", rules.State.ORPHAN)
        orphaned_ms = system_ms()
        assert (await settled(own)).completed.usage.completion_tokens == 5
        assert system_ms() - orphaned_ms > 1.8 * LEASE_S * 1000
        assert own.metric("tidemill_router_resolutions_total", known_from="checkpoint") == 1


async def test_with_neither_the_money_is_freed(server: RedisProcess, tmp_path: Path) -> None:
    await vanished(server, tmp_path, tokens=None)
    async with desk(server, tmp_path) as own:
        await own.until("r1", rules.State.RELEASED)
        assert (await own.account()).balance == rules.Balance(0, 10**9, 0)


async def test_what_was_generated_beyond_the_funds_is_not_billed(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    async with desk(server, tmp_path, workers=[KeptFinals(kept_final(hold, 90))]) as own:
        usage = (await settled(own)).completed.usage
        assert (usage.completion_tokens, usage.unbilled.overrun) == (64, 26)


async def test_an_attempt_that_still_runs_is_waited_for(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    worker = KeptFinals()
    worker.running = True
    async with desk(server, tmp_path, workers=[worker]) as own:
        await own.until("r1", rules.State.ORPHAN)
        worker.finals.append(kept_final(hold, 30))
        await asyncio.sleep(0.3)
        assert await own.state("r1") is rules.State.ORPHAN
        worker.running = False
        assert (await settled(own)).completed.usage.completion_tokens == 30


async def test_a_worker_that_does_not_answer_is_asked_again_beyond_two_leases(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    worker = KeptFinals(kept_final(hold, 30))
    worker.silent = True
    async with desk(server, tmp_path, workers=[worker]) as own:
        await own.until("r1", rules.State.ORPHAN)
        await asyncio.sleep(2.5 * LEASE_S)
        assert await own.state("r1") is rules.State.ORPHAN
        worker.silent = False
        assert (await settled(own)).completed.usage.completion_tokens == 30


async def test_a_taken_over_request_waits_for_a_worker_that_does_not_answer_at_first(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    final = kept_final(hold, 30)
    worker = KeptFinals(final)
    worker.silent = True
    fleet = cast(retained.Workers, SimpleNamespace(decoders=lambda: [worker]))
    fences = range(final.id.fence, final.id.fence + 1)
    asked = asyncio.create_task(retained.former(fleet, final.id.request_id, fences))
    await asyncio.sleep(1.5)
    worker.silent = False
    assert [each.end.generated_tokens for each in await asked] == [30]


async def test_several_resolvers_charge_once(server: RedisProcess, tmp_path: Path) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    async with AsyncExitStack() as stack:
        desks = [
            await stack.enter_async_context(
                desk(server, tmp_path, workers=[KeptFinals(kept_final(hold, 30))])
            )
            for _ in range(3)
        ]
        await settled(desks[0])
        await asyncio.sleep(2 * LEASE_S)
        account = await desks[0].account()
        assert account.position == 1
        known = [
            each.metric("tidemill_router_resolutions_total", known_from="final") for each in desks
        ]
        assert sum(known) == 1


async def test_a_retry_meets_a_resolver_at_work_and_later_its_receipt(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    worker = KeptFinals()
    async with desk(server, tmp_path, workers=[worker]) as own:
        await own.until("r1", rules.State.ORPHAN)
        with pytest.raises(RequestInProgress):
            await own.open("r1")
        worker.finals.append(kept_final(hold, 30))
        found = (await settled(own)).completed
        again = await own.open("r1")
        assert isinstance(again, Completed)
        assert again.again
        assert again.receipt == found.receipt


async def test_an_owner_that_lives_after_all_settles_before_the_resolver(
    server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(server, tmp_path) as own:
        await own.top_up(10**9)
        hold = await own.hold("r1")
        own.money.leases.discard(hold)
        await own.until("r1", rules.State.ORPHAN)
        completed = await settle(hold, 12)
        assert completed.chained is not None
        await asyncio.sleep(3 * LEASE_S)
        assert (await own.account()).position == 1


async def test_nothing_is_orphaned_within_a_lease_of_the_ledgers_restart(
    server: RedisProcess, tmp_path: Path
) -> None:
    await vanished(server, tmp_path, tokens=5)
    await asyncio.sleep(LEASE_S)
    server.kill()
    server.start()
    async with desk(server, tmp_path, lease_s=1.5) as own:
        started_ms = system_ms()
        await own.until("r1", rules.State.ORPHAN)
        assert system_ms() - started_ms >= 1400


async def test_nothing_is_orphaned_within_a_lease_of_the_ledgers_return_from_a_hang(
    server: RedisProcess, tmp_path: Path
) -> None:
    lease_s = 1.5  # long enough not to run out before the ledger hangs
    async with desk(server, tmp_path, lease_s=lease_s, timeout_s=0.5) as own:
        await vanished(server, tmp_path, tokens=5, lease_s=lease_s)
        with server.frozen():
            await eventually(lambda: own.money.readiness is not None)
            await asyncio.sleep(lease_s)
        back_ms = system_ms()
        await own.until("r1", rules.State.ORPHAN)
        assert system_ms() - back_ms >= 1400


async def test_a_router_that_stalled_does_not_resolve_what_it_runs(
    server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(server, tmp_path) as own:
        await own.end("lease renewal")  # it is late, and may come after the resolver
        await own.top_up(10**9)
        hold = await own.hold("r1")
        await asyncio.sleep(2 * LEASE_S)
        assert await own.state("r1") is rules.State.OPEN
        assert (await settle(hold, 12)).chained is not None


async def test_a_final_of_an_earlier_life_of_the_id_counts_for_nothing(
    server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(server, tmp_path, resolving=False) as gone:
        await gone.top_up(10**9)
        first = await gone.hold("r1")
        await first.release(usage(50), Cancelled("its worker was lost"))
        second = await gone.hold("r1")
        second.checkpoint(lambda: progress(5))
        await gone.tasks.join(1.0)
    worker = KeptFinals(kept_final(first, 50))
    async with desk(server, tmp_path, workers=[worker]) as own:
        found = (await settled(own)).completed.usage
    assert (found.completion_tokens, found.generated_tokens) == (5, 5)
    assert worker.acknowledged == []


async def test_finals_are_left_to_who_has_taken_the_request_over_meanwhile(
    server: RedisProcess, tmp_path: Path
) -> None:
    hold = await vanished(server, tmp_path, tokens=5)
    worker = KeptFinals()
    worker.running = True
    async with desk(server, tmp_path, workers=[worker], resolving=False) as other:
        async with desk(server, tmp_path, workers=[worker]) as own:
            await own.until("r1", rules.State.ORPHAN)
            await own.end("the resolver")
            await asyncio.sleep(1.5 * LEASE_S)
            second = await other.hold("r1")
            worker.finals.append(kept_final(hold, 30))
            worker.running = False
            await eventually(
                lambda: own.metric("tidemill_router_settlements_total", outcome="stale") == 1
            )
        assert worker.acknowledged == []
        assert (await settle(second, 12)).usage.completion_tokens == 12
