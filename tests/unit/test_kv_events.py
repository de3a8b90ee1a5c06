"""A watcher of the worker's KV events knows what the pool holds, whatever it missed."""

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.blocks import block_names, chain_hashes, root_hash
from tidemill.engine import BlockPool, PoolTier
from tidemill.worker.kv_events import TIERS, KvEvents

ROOT = root_hash(b"model", "format", b"scope")
EPOCH = 7
NUM_BLOCKS = 4


def make_pool(host_blocks: int = 4) -> BlockPool:
    return BlockPool(
        num_layers=1,
        num_blocks=NUM_BLOCKS,
        latent_dim=1,
        dtype=torch.float32,
        host_blocks=host_blocks,
    )


def chain(token: int, num_blocks: int) -> list[bytes]:
    return chain_hashes(ROOT, [token] * (64 * num_blocks))


def put(pool: BlockPool, token: int, num_blocks: int) -> None:
    """Hold the chain's start as a prompt would, and let go of it."""
    hashes = chain(token, num_blocks)
    taken = pool.reserve(hashes, num_blocks)
    pool.settle(taken)
    for block, block_hash in zip(taken.block_table, hashes, strict=True):
        pool.commit(block, block_hash, ROOT)
    pool.release(taken.block_table)


@dataclass
class Watcher:
    """Believes what it is told. `limit` messages are read of what it is sent, then it hangs up."""

    events: KvEvents
    epoch: int | None = None
    sequence: int = 0
    held: set[tuple[int, int]] = field(default_factory=set)
    num_resets: int = 0

    def read(self, limit: int = 1_000_000) -> list[pb.WatchKvResponse]:
        read: list[pb.WatchKvResponse] = []
        for message in self.events.after(self.epoch, self.sequence):
            if len(read) == limit:
                break
            read.append(message)
            assert message.resets or message.sequence == self.sequence + 1
            self.epoch, self.sequence = message.epoch, message.sequence
            if message.resets:
                self.held.clear()
                self.num_resets += 1
            for change in message.changes:
                blocks = {(change.tier, name) for name in change.blocks}
                self.held = self.held - blocks if change.removed else self.held | blocks
        return read


def truth(pool: BlockPool) -> set[tuple[int, int]]:
    held = pool.findable()
    return {(TIERS[tier], name) for tier in held for name in block_names(held[tier])}


def test_whoever_comes_late_is_told_all_that_is_held() -> None:
    pool = make_pool()
    put(pool, 1, 3)  # before anybody listens
    events = KvEvents(pool, epoch=EPOCH)
    put(pool, 2, 2)
    watcher = Watcher(events)
    (message,) = watcher.read()
    assert (message.epoch, message.resets) == (EPOCH, True)
    assert watcher.held == truth(pool) != set()
    assert {tier for tier, _ in watcher.held} == {pb.KV_TIER_DEVICE, pb.KV_TIER_HOST}


def test_even_an_empty_pool_is_told() -> None:
    watcher = Watcher(KvEvents(make_pool(), epoch=EPOCH))
    assert [message.resets for message in watcher.read()] == [True]
    assert watcher.read() == []


def test_blocks_that_come_and_are_evicted_are_told_in_one_message() -> None:
    pool = make_pool(host_blocks=0)
    watcher = Watcher(KvEvents(pool, epoch=EPOCH))
    watcher.read()
    put(pool, 1, 3)
    put(pool, 2, 2)
    (message,) = watcher.read()
    assert not message.resets
    first, second = block_names(chain(1, 3)), block_names(chain(2, 2))
    told = [(change.removed, list(change.blocks)) for change in message.changes]
    assert told == [(False, first), (True, [first[2]]), (False, second)]
    assert watcher.held == truth(pool)


def test_what_the_device_evicts_is_told_as_held_in_host_memory() -> None:
    pool = make_pool()
    watcher = Watcher(KvEvents(pool, epoch=EPOCH))
    put(pool, 1, 2)
    watcher.read()
    put(pool, 2, NUM_BLOCKS)
    watcher.read()
    assert {(pb.KV_TIER_HOST, name) for name in block_names(chain(1, 2))} < watcher.held
    assert watcher.held == truth(pool)


def test_one_who_comes_back_is_told_what_it_missed_and_no_more() -> None:
    pool = make_pool()
    events = KvEvents(pool, epoch=EPOCH)
    away, here = Watcher(events), Watcher(events)
    away.read()
    for token in range(5):
        put(pool, token, 2)
        here.read()
    assert len(away.read()) == 6  # the fifth tells of the other's arrival, and nothing else
    assert away.num_resets == 1
    assert away.held == here.held == truth(pool)


def test_one_who_was_away_longer_than_the_log_is_told_all_again() -> None:
    pool = make_pool()
    events = KvEvents(pool, epoch=EPOCH, log_blocks=8)
    away, here = Watcher(events), Watcher(events)
    away.read()
    for token in range(9):
        put(pool, token, 2)
        here.read()
    away.read()
    assert away.num_resets == 2
    assert away.held == truth(pool)


def test_what_another_epoch_said_counts_for_nothing() -> None:
    pool = make_pool()
    events = KvEvents(pool, epoch=EPOCH)
    Watcher(events).read()
    watcher = Watcher(events, epoch=EPOCH - 1, sequence=1, held={(1, 1)})
    watcher.read()
    assert (watcher.num_resets, watcher.held) == (1, set())


def test_one_who_hung_up_amid_all_that_is_held_is_told_all_again() -> None:
    pool = make_pool()
    put(pool, 1, NUM_BLOCKS)
    events = KvEvents(pool, epoch=EPOCH, part_blocks=1)
    for limit in range(1, NUM_BLOCKS):
        watcher = Watcher(events)
        watcher.read(limit)
        watcher.read()
        assert watcher.num_resets == 2
        assert watcher.held == truth(pool)
    watcher = Watcher(events)
    watcher.read(NUM_BLOCKS)
    watcher.read()
    assert watcher.num_resets == 1


def test_what_nobody_reads_is_bounded() -> None:
    pool = make_pool(host_blocks=0)
    events = KvEvents(pool, epoch=EPOCH, log_blocks=10)
    watcher = Watcher(events)
    watcher.read()
    for token in range(100):
        put(pool, token, 2)
    assert len(events._events) <= 10
    watcher.read()
    assert watcher.num_resets == 2
    assert watcher.held == truth(pool)
    for _ in range(100):  # nor is coming and going kept for ever
        Watcher(events).read()
    assert len(events._log) <= 10


def test_no_message_is_longer_than_a_part() -> None:
    pool = make_pool()
    events = KvEvents(pool, epoch=EPOCH, part_blocks=3)
    watcher = Watcher(events)
    put(pool, 1, 4)
    messages = watcher.read()
    put(pool, 2, 4)
    messages += watcher.read()
    sizes = [sum(len(change.blocks) for change in message.changes) for message in messages]
    assert max(sizes) == 3
    assert watcher.held == truth(pool)


ACTIONS = st.one_of(
    st.tuples(st.just("put"), st.integers(0, 4), st.integers(1, NUM_BLOCKS)),
    st.tuples(st.just("read"), st.integers(0, 2), st.integers(0, 4)),
    st.tuples(st.just("restart"), st.integers(0, 2), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=40), st.integers(1, 4), st.integers(2, 20), st.integers(0, 4))
def test_every_watcher_ends_up_knowing_what_the_pool_holds(
    actions: list[tuple[str, int, int]], part_blocks: int, log_blocks: int, host_blocks: int
) -> None:
    pool = make_pool(host_blocks)
    events = KvEvents(pool, epoch=EPOCH, log_blocks=log_blocks, part_blocks=part_blocks)
    watchers = [Watcher(events) for _ in range(3)]
    for what, who, number in actions:
        if what == "put":
            put(pool, who, number)
        elif what == "read":
            watchers[who].read(number)
        else:
            watchers[who] = Watcher(events)
    for watcher in watchers:
        watcher.read()
        assert watcher.held == truth(pool)
        assert watcher.epoch == EPOCH


def test_tiers_are_those_of_the_pool() -> None:
    assert set(TIERS) == set(PoolTier)
