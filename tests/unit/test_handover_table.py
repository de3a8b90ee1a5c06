"""Leases and states of hand-overs, on a clock of our own."""

import asyncio

import pytest

from tidemill.errors import FailedPrecondition, NotFound
from tidemill.kv.handover import Handover, HandoverState, HandoverTable
from tidemill.kv.segments import LatentRange

EPOCH = 7


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_table(clock: Clock) -> HandoverTable:
    return HandoverTable(epoch=EPOCH, lease_s=10.0, clock=clock)


def make_handover(
    closed: list[HandoverState], *, first_token: int = 0, num_tokens: int = 100
) -> Handover:
    return Handover(
        block_table=[3, 1],
        num_layers=2,
        first_token=first_token,
        num_tokens=num_tokens,
        on_close=closed.append,
    )


async def test_a_lease_that_nobody_renews_ends_once() -> None:
    clock, closed = Clock(), list[HandoverState]()
    table, handover = make_table(clock), make_handover(closed)
    table.offer(handover)
    clock.now = 9.0
    assert table.sweep() == 0
    table.renew(handover)
    clock.now = 18.0
    assert table.sweep() == 0
    clock.now = 19.0
    assert table.sweep() == 1
    assert table.sweep() == 0
    assert closed == [HandoverState.EXPIRED]
    assert len(table) == 0
    assert not table.close(handover, HandoverState.RELEASED)
    assert closed == [HandoverState.EXPIRED]


async def test_a_lease_does_not_run_out_while_it_is_pulled() -> None:
    clock, closed = Clock(), list[HandoverState]()
    table, handover = make_table(clock), make_handover(closed)
    table.offer(handover)
    handover.pulls = 1
    clock.now = 100.0
    assert table.sweep() == 0
    handover.pulls = 0
    clock.now = 109.0
    assert table.sweep() == 0
    clock.now = 110.0
    assert table.sweep() == 1


async def test_only_the_epoch_that_offered_a_hand_over_knows_it() -> None:
    table, handover = make_table(Clock()), make_handover([])
    table.offer(handover)
    assert table.get(handover.handover_id, EPOCH) is handover
    with pytest.raises(FailedPrecondition):
        table.get(handover.handover_id, EPOCH + 1)
    assert not table.release(handover.handover_id, EPOCH + 1)
    assert table.release(handover.handover_id, EPOCH)
    assert not table.release(handover.handover_id, EPOCH)
    with pytest.raises(NotFound):
        table.get(handover.handover_id, EPOCH)


async def test_ranges_are_given_as_they_become_ready_without_what_the_asker_holds() -> None:
    handover = make_handover([], first_token=64)
    waiting = asyncio.create_task(handover.ranges_from(0))
    await asyncio.sleep(0)
    handover.ready(0, 0, 64)
    await asyncio.sleep(0)
    assert not waiting.done()
    handover.ready(0, 0, 80)
    assert await waiting == [LatentRange(0, 64, 80)]
    handover.ready(1, 0, 80)
    handover.ready(0, 80, 100)
    handover.ready(1, 80, 100)
    assert handover.complete
    assert len(await handover.ranges_from(1)) == 3
    assert await handover.ranges_from(4) == []


async def test_whoever_waits_for_a_hand_over_that_ends_is_told() -> None:
    handover = make_handover([])
    waiting = asyncio.create_task(handover.ranges_from(0))
    await asyncio.sleep(0)
    handover.close(HandoverState.ABORTED)
    with pytest.raises(FailedPrecondition, match="aborted"):
        await waiting


async def test_a_hand_over_with_nothing_to_move_is_complete_at_once() -> None:
    handover = make_handover([], first_token=128, num_tokens=128)
    assert handover.complete
    assert await handover.ranges_from(0) == []
