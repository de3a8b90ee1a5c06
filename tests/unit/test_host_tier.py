"""What the device evicts is found again in host memory, bit for bit."""

import threading
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tidemill.blocks import chain_hashes, root_hash
from tidemill.engine import BlockPool, PoolCorrupted, PoolTier
from tidemill.errors import PoolExhausted

ROOT = root_hash(b"model", "format", b"scope")
DEVICE, HOST = PoolTier.DEVICE, PoolTier.HOST


def make_pool(num_blocks: int, host_blocks: int) -> BlockPool:
    return BlockPool(
        num_layers=2,
        num_blocks=num_blocks,
        latent_dim=3,
        dtype=torch.bfloat16,
        host_blocks=host_blocks,
    )


def hashes_of(num_blocks: int, token: int = 0) -> list[bytes]:
    return chain_hashes(ROOT, [token] * (64 * num_blocks))


def content(token: int, index: int) -> torch.Tensor:
    """What block `index` of chain `token` holds; NaNs and negative zeros included."""
    generator = torch.Generator().manual_seed(100 * token + index)
    bits = torch.randint(-(2**15), 2**15, (2, 64, 3), generator=generator, dtype=torch.int16)
    return bits.view(torch.bfloat16)


def same_bits(values: torch.Tensor, token: int, index: int) -> bool:
    return torch.equal(values.view(torch.int16), content(token, index).view(torch.int16))


def put_chain(pool: BlockPool, num_blocks: int, token: int = 0) -> None:
    blocks = pool.allocate(num_blocks)
    for index, (block, name) in enumerate(zip(blocks, hashes_of(num_blocks, token), strict=True)):
        pool.write_block(block, content(token, index))
        pool.commit(block, name, ROOT)
    pool.release(blocks)


def evict_all(pool: BlockPool) -> None:
    pool.release(pool.allocate(pool.num_blocks))


def test_an_evicted_chain_is_claimed_from_host_bit_for_bit() -> None:
    pool = make_pool(4, host_blocks=4)
    put_chain(pool, 3)
    evict_all(pool)
    assert pool.locate(hashes_of(4)) == [HOST] * 3
    blocks = pool.claim(hashes_of(4))
    assert len(blocks) == 3
    for index, block in enumerate(blocks):
        assert same_bits(pool.read_block(block), 0, index)
    assert pool.locate(hashes_of(4)) == [DEVICE] * 3
    pool.release(blocks)
    pool.check_idle()


def test_without_a_host_tier_the_evicted_is_gone() -> None:
    pool = make_pool(2, host_blocks=0)
    put_chain(pool, 2)
    evict_all(pool)
    assert pool.locate(hashes_of(2)) == []
    pool.check_idle()


def test_a_chain_may_begin_on_the_device_and_go_on_in_host_memory() -> None:
    pool = make_pool(4, host_blocks=4)
    put_chain(pool, 3)
    pool.release(pool.allocate(3))  # one is free, so two are evicted: the chain's tail
    assert pool.locate(hashes_of(3)) == [DEVICE, HOST, HOST]
    reservation = pool.reserve(hashes_of(3), 4)
    assert reservation.tiers == [DEVICE, HOST, HOST]
    pool.settle(reservation)
    for index, block in enumerate(reservation.block_table[:3]):
        assert same_bits(pool.read_block(block), 0, index)
    assert not pool.read_block(reservation.block_table[3]).any()
    pool.release(reservation.block_table)
    pool.check_idle()


def test_promotion_may_take_the_blocks_that_it_then_demotes() -> None:
    pool = make_pool(2, host_blocks=2)
    put_chain(pool, 2, token=1)
    evict_all(pool)
    put_chain(pool, 2, token=2)  # fills the device; nobody holds it
    blocks = pool.claim(hashes_of(2, 1))
    assert [same_bits(pool.read_block(block), 1, i) for i, block in enumerate(blocks)] == [True] * 2
    pool.release(blocks)
    # Host memory was full of the pinned chain, so the other one is lost.
    assert pool.locate(hashes_of(2, 2)) == []
    pool.check_idle()


def test_a_claim_takes_as_much_of_a_chain_as_there_is_room_to_promote() -> None:
    pool = make_pool(4, host_blocks=8)
    put_chain(pool, 4)
    evict_all(pool)
    held = pool.allocate(2)
    claimed = pool.claim(hashes_of(4))
    assert len(claimed) == 2
    with pytest.raises(PoolExhausted, match="2 blocks wanted, 0 of 4 free"):
        pool.reserve(hashes_of(4), 4)
    pool.release(claimed)
    pool.release(held)
    pool.check_idle()


def test_the_host_tier_drops_what_was_used_longest_ago_tail_first() -> None:
    pool = make_pool(3, host_blocks=4)
    put_chain(pool, 3, token=1)
    evict_all(pool)
    put_chain(pool, 3, token=2)
    evict_all(pool)
    assert pool.locate(hashes_of(3, 2)) == [HOST] * 3
    assert pool.locate(hashes_of(3, 1)) == [HOST]
    pool.check_idle()


def test_a_promoted_block_is_evicted_again_without_a_copy() -> None:
    pool = make_pool(2, host_blocks=4)
    put_chain(pool, 2)
    evict_all(pool)
    pool.release(pool.claim(hashes_of(2)))
    reservation = pool.reserve((), 2)
    assert reservation.demoted == []
    pool.settle(reservation)
    assert pool.locate(hashes_of(2)) == [HOST] * 2
    pool.release(reservation.block_table)
    pool.check_idle()


def test_an_unsettled_reservation_can_be_cancelled() -> None:
    pool = make_pool(2, host_blocks=3)
    put_chain(pool, 2, token=1)
    evict_all(pool)
    put_chain(pool, 1, token=2)
    reservation = pool.reserve(hashes_of(1, 1), 2)
    with pytest.raises(PoolCorrupted, match="held while idle"):
        pool.check_idle()
    pool.cancel(reservation)
    pool.release(reservation.block_table)
    pool.settle(reservation)
    pool.check_idle()
    assert pool.locate(hashes_of(2, 1)) == [HOST, HOST]


def test_a_block_is_read_where_it_lies_and_only_under_its_root() -> None:
    pool = make_pool(2, host_blocks=2)
    put_chain(pool, 1)
    [name] = hashes_of(1)
    for _ in ("on the device", "in host memory"):
        values = pool.read_committed(name, ROOT)
        assert values is not None
        assert same_bits(values, 0, 0)
        assert pool.read_committed(name, b"another scope's root") is None
        assert pool.locate([name], root=b"another scope's root") == []
        evict_all(pool)
    assert pool.read_committed(b"unknown") is None
    pool.check_idle()


def test_integrity_check_sees_a_lost_host_slot() -> None:
    pool = make_pool(2, host_blocks=2)
    pool._host._free.pop()
    with pytest.raises(PoolCorrupted, match="host slot is lost"):
        pool.check_integrity()


def test_threads_read_what_was_written_while_blocks_move() -> None:
    pool = make_pool(8, host_blocks=16)
    for token in range(6):
        put_chain(pool, 3, token)
    wrong: list[int] = []

    def churn(seed: int) -> None:
        for step in range(120):
            token = (seed + step) % 6
            try:
                blocks = pool.claim(hashes_of(3, token))
            except PoolExhausted:
                continue
            wrong.extend(
                token
                for index, block in enumerate(blocks)
                if not same_bits(pool.read_block(block), token, index)
            )
            pool.release(blocks)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pool.check_idle()


class TieredPoolAgainstModel(RuleBasedStateMachine):
    """No block is lost or doubly owned, and a claim returns the chain's own bytes."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(6, host_blocks=5)
        self.references: Counter[int] = Counter()

    @rule(target=holdings, n=st.integers(0, 4), token=st.integers(0, 2))
    def compute(self, n: int, token: int) -> list[int]:
        """As a worker: claim what is held of a chain, compute and commit the rest."""
        hashes = hashes_of(n, token)
        held = self.pool.locate(hashes)
        try:
            reservation = self.pool.reserve(hashes, n)
        except PoolExhausted:
            assert n > self.pool.num_free
            return []
        assert reservation.tiers == held
        self.pool.settle(reservation)
        for index, block in enumerate(reservation.block_table):
            if index < len(held):
                assert same_bits(self.pool.read_block(block), token, index)
            else:
                assert self.references[block] == 0
                assert not self.pool.read_block(block).any()
                self.pool.write_block(block, content(token, index))
                self.pool.commit(block, hashes[index], ROOT)
        self.references.update(reservation.block_table)
        return reservation.block_table

    @rule(target=holdings, n=st.integers(1, 4))
    def allocate(self, n: int) -> list[int]:
        try:
            blocks = self.pool.allocate(n)
        except PoolExhausted:
            return []
        assert all(self.references[block] == 0 for block in blocks)
        self.references.update(blocks)
        return blocks

    @rule(n=st.integers(1, 4), token=st.integers(0, 2))
    def reserve_and_cancel(self, n: int, token: int) -> None:
        try:
            reservation = self.pool.reserve(hashes_of(n, token), n)
        except PoolExhausted:
            assert n > self.pool.num_free
            return
        self.pool.cancel(reservation)
        self.pool.release(reservation.block_table)

    @rule(n=st.integers(1, 4), token=st.integers(0, 2))
    def read(self, n: int, token: int) -> None:
        for index, name in enumerate(hashes_of(n, token)):
            values = self.pool.read_committed(name, ROOT)
            assert values is None or same_bits(values, token, index)

    @rule(holding=consumes(holdings))
    def release(self, holding: list[int]) -> None:
        self.pool.release(holding)
        self.references.subtract(holding)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        held = sum(1 for count in self.references.values() if count > 0)
        assert self.pool.num_referenced == held
        assert self.pool.num_host_free == self.pool.num_host_blocks


TieredPoolAgainstModel.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
TestTieredPoolAgainstModel = TieredPoolAgainstModel.TestCase
