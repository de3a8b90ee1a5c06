import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.router.finish import Completed, Finish, Timing
from services.router.money import record
from services.router.money.hold import Hold
from tests.money_desk import (
    LEASE_S,
    SITE,
    Desk,
    KeptFinals,
    desk,
    eventually,
    kept_final,
    progress,
    settle,
    usage,
)
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tidemill.billing import ledger as rules
from tidemill.errors import Aborted, Internal, RequestInProgress, Unavailable

pytestmark = pytest.mark.redis

Pair = tuple[Desk, Desk]


@pytest.fixture
async def pair(redis_server: Callable[..., RedisProcess], tmp_path: Path) -> AsyncIterator[Pair]:
    """Two routers at one ledger that resolve nothing by themselves."""
    server = redis_server(**DURABLE)
    async with (
        desk(server, tmp_path, resolving=False) as one,
        desk(server, tmp_path, resolving=False) as two,
    ):
        await one.top_up(10**9)
        yield one, two


async def vanish(own: Desk, hold: Hold) -> None:
    """The hold's router is heard of no more."""
    own.money.leases.discard(hold)
    await asyncio.sleep(LEASE_S + 0.1)


async def test_a_living_owner_keeps_its_request(pair: Pair) -> None:
    one, two = pair
    await one.hold("r1")
    await asyncio.sleep(2 * LEASE_S)
    with pytest.raises(RequestInProgress):
        await two.open("r1")


async def test_a_retry_takes_a_vanished_routers_request_over(pair: Pair) -> None:
    one, two = pair
    first = await one.hold("r1", seed=7)
    first.checkpoint(lambda: progress(20))
    await one.tasks.join(1.0)
    held = (await one.account()).balance.held_nano
    await vanish(one, first)
    second = await two.hold("r1", seed=8)
    assert (second.fence, second.next_attempt) == (2, 2)
    assert second.before is not None
    assert (second.before.usage, second.before.site) == (usage(20), SITE)
    assert second.admitted.sampling.seed == 7, "the draws of its first life"
    assert second.admitted.admitted_at_ms == first.admitted.admitted_at_ms
    assert (await one.account()).balance.held_nano == held, "nothing is held twice"
    completed = await settle(second, 30)
    assert completed.usage.completion_tokens == 30
    assert completed.usage.unbilled.failover_redo == 20
    assert completed.usage.generated_tokens == 50
    assert (await one.account()).position == 1


async def test_what_an_older_fence_generated_after_its_checkpoint_is_counted_and_acknowledged(
    redis_server: Callable[..., RedisProcess], tmp_path: Path
) -> None:
    server, worker = redis_server(**DURABLE), KeptFinals()
    async with (
        desk(server, tmp_path, resolving=False) as one,
        desk(server, tmp_path, resolving=False, workers=[worker]) as two,
    ):
        await one.top_up(10**9)
        first = await one.hold("r1")
        first.checkpoint(lambda: progress(20))
        await one.tasks.join(1.0)
        await vanish(one, first)
        worker.finals.append(kept_final(first, 52))
        second = await two.hold("r1")
        worker.finals.append(kept_final(second, 30, attempt=2))
        completed = await settle(second, 30)
        assert completed.usage.unbilled.failover_redo == 52
        assert completed.usage.generated_tokens == 82
        await two.tasks.join(1.0)
        assert [each.fence for each in worker.acknowledged] == [1]
        posted = (await two.account()).requests["r1"].posted
        assert posted is not None
        assert sum(part.busy_us for part in record.settled(posted).busy) == 750_000


async def test_an_id_that_lives_anew_does_not_count_what_its_former_life_generated(
    redis_server: Callable[..., RedisProcess], tmp_path: Path
) -> None:
    worker = KeptFinals()
    async with desk(redis_server(**DURABLE), tmp_path, workers=[worker]) as own:
        await own.top_up(10**9)
        first = await own.hold("r1")
        worker.finals.append(kept_final(first, 52))
        await first.release(usage(0, prompt_tokens=0, host=0), Internal("a worker failed"))
        second = await own.hold("r1")
        assert second.fence == 2
        completed = await settle(second, 30)
        assert completed.usage.generated_tokens == 30
        assert not worker.acknowledged


async def test_the_prompts_split_is_the_first_one_whoever_settles(pair: Pair) -> None:
    one, two = pair
    first = await one.hold("r1")
    first.checkpoint(lambda: progress(20))
    await one.tasks.join(1.0)
    await vanish(one, first)
    second = await two.hold("r1")
    second.checkpoint(lambda: progress(1))
    await two.tasks.join(1.0)
    await vanish(two, second)
    third = await one.hold("r1")
    assert third.before is not None
    assert third.before.usage.unbilled.failover_redo == 20
    completed = await third.settle(
        usage(5, host=0), finish=Finish.STOP, site=SITE, timing=Timing(), attempts=3, busy=()
    )
    assert (completed.usage.cache_hit_tokens, completed.usage.reused.host) == (64, 64)
    assert completed.usage.unbilled.failover_redo == 21


async def test_a_router_that_lost_its_request_stops_it_and_charges_nothing(pair: Pair) -> None:
    one, two = pair
    first = await one.hold("r1")
    lost: list[bool] = []
    first.on_lost = lambda: lost.append(True)
    await vanish(one, first)
    second = await two.hold("r1")
    one.money.leases.add(first)
    await eventually(lambda: bool(lost))
    assert await first.fund(progress(3)) is None
    with pytest.raises(Aborted) as refused:
        await settle(first, 10)
    assert (refused.value.reason, refused.value.metadata["fence"]) == ("STALE_FENCE", "2")
    with pytest.raises(Aborted):
        await first.release(usage(3), Internal("lost"))
    assert one.metric("tidemill_router_settlements_total", outcome="stale") == 2
    completed = await settle(second, 7)
    assert (await two.account()).position == 1
    late = await settle(first, 10)
    assert late.receipt == completed.receipt, "the other one's"


async def test_a_checkpoint_of_an_older_fence_is_not_written(pair: Pair) -> None:
    one, two = pair
    first = await one.hold("r1")
    await vanish(one, first)
    second = await two.hold("r1")
    second.checkpoint(lambda: progress(2))
    await two.tasks.join(1.0)
    lost: list[bool] = []
    first.on_lost = lambda: lost.append(True)
    first.checkpoint(lambda: progress(50))
    await one.tasks.join(1.0)
    assert lost, "that is how it hears of it"
    assert '"completion_tokens":2,' in (await one.account()).requests["r1"].checkpoint


async def test_of_many_retries_one_takes_the_request(pair: Pair) -> None:
    one, two = pair
    await vanish(one, await one.hold("r1"))
    answers = await asyncio.gather(
        *(each.open("r1") for each in (one, two) * 10), return_exceptions=True
    )
    assert sum(isinstance(each, Hold) for each in answers) == 1
    assert sum(isinstance(each, RequestInProgress) for each in answers) == 19


async def test_routers_whose_clocks_disagree_charge_once_and_the_one_that_is_off_lets_nothing_in(
    redis_server: Callable[..., RedisProcess], tmp_path: Path
) -> None:
    server = redis_server(**DURABLE)
    async with (
        desk(server, tmp_path) as right,
        desk(server, tmp_path, skew_ms=-700) as behind,
        desk(server, tmp_path, skew_ms=400) as ahead,
    ):
        await eventually(lambda: right.money.readiness is None)
        await eventually(lambda: ahead.money.readiness is None)
        await eventually(lambda: "clock" in (behind.money.readiness or ""))
        await right.top_up(10**9)
        hold = await ahead.hold("r1")
        ahead.money.leases.discard(hold)
        with pytest.raises(RequestInProgress):
            await right.open("r1")
        with pytest.raises(Unavailable, match="ms off the ledger") as refused:
            await behind.open("r2")
        assert refused.value.reason == "CLOCK_OFF"
        await right.until("r1", rules.State.ORPHAN)
        completed = await settle(hold, 4)
        assert completed.receipt.decided_at_ms >= completed.receipt.admitted_at_ms
        assert (await right.account()).position == 1


async def test_a_settled_takeover_is_answered_alike_by_every_router(pair: Pair) -> None:
    one, two = pair
    await vanish(one, await one.hold("r1"))
    completed = await settle(await two.hold("r1"), 7)
    for each in pair:
        again = await each.open("r1")
        assert isinstance(again, Completed)
        assert again.again
        assert again.receipt == completed.receipt
