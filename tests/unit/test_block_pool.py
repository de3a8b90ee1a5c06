import threading
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tidemill.blocks import chain_hashes, root_hash
from tidemill.engine import BlockPool, PoolCorrupted
from tidemill.errors import PoolExhausted

ROOT = root_hash(b"model", "format", b"scope")


def make_pool(num_blocks: int = 4) -> BlockPool:
    return BlockPool(num_layers=2, num_blocks=num_blocks, latent_dim=3, dtype=torch.float32)


def hashes_of(num_blocks: int, first_token: int = 0) -> list[bytes]:
    return chain_hashes(ROOT, [first_token] * (64 * num_blocks))


def test_allocation_beyond_free_blocks_takes_nothing() -> None:
    pool = make_pool(4)
    pool.allocate(3)
    with pytest.raises(PoolExhausted, match="2 blocks wanted, 1 of 4 free"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_committed_blocks_are_found_until_evicted_tail_first() -> None:
    pool = make_pool(4)
    hashes = hashes_of(3)
    blocks = pool.allocate(3)
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.commit(block, block_hash)
    pool.release(blocks)
    assert pool.num_free == 4
    assert pool.match(hashes) == 3
    pool.allocate(2)
    assert pool.match(hashes) == 2
    assert pool.claim(hashes) == blocks[:2]
    pool.check_integrity()


def test_least_recently_released_chain_is_evicted_first() -> None:
    pool = make_pool(2)
    for token in (1, 2):
        (block,) = pool.allocate(1)
        pool.commit(block, hashes_of(1, token)[0])
        pool.release([block])
    pool.release(pool.claim(hashes_of(1, 1)))
    pool.allocate(1)
    assert pool.match(hashes_of(1, 1)) == 1
    assert pool.match(hashes_of(1, 2)) == 0


def test_claimed_blocks_are_never_evicted() -> None:
    pool = make_pool(2)
    (block,) = pool.allocate(1)
    pool.commit(block, hashes_of(1)[0])
    pool.release([block])
    assert pool.claim(hashes_of(1)) == [block]
    pool.allocate(1)
    with pytest.raises(PoolExhausted):
        pool.allocate(1)


def test_second_block_with_the_same_content_is_not_committed() -> None:
    pool = make_pool(4)
    first, second = pool.allocate(2)
    pool.commit(first, hashes_of(1)[0])
    pool.commit(second, hashes_of(1)[0])
    pool.release([first, second])
    assert pool.claim(hashes_of(1)) == [first]
    pool.check_integrity()


def test_releasing_twice_is_refused() -> None:
    pool = make_pool()
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(PoolCorrupted, match="released but not referenced"):
        pool.release(blocks)


def test_committing_an_unheld_block_is_refused() -> None:
    pool = make_pool()
    with pytest.raises(PoolCorrupted, match="committed but not referenced"):
        pool.commit(0, hashes_of(1)[0])


def test_integrity_check_sees_a_lost_block() -> None:
    pool = make_pool()
    pool._free.pop()
    with pytest.raises(PoolCorrupted):
        pool.check_integrity()


def test_latents_moved_by_read_and_write_are_bitwise_equal() -> None:
    pool = BlockPool(num_layers=2, num_blocks=6, latent_dim=5, dtype=torch.bfloat16)
    values = torch.randn(130, 5).to(torch.bfloat16)
    pool.write(1, [4, 0, 2], 7, values)
    assert torch.equal(pool.read(1, [4, 0, 2], 7, 137), values)
    assert torch.equal(pool.latents[1, 0], values[57:121])
    assert not pool.latents[0].any()
    pool.write_block(5, pool.read_block(0))
    assert torch.equal(pool.latents[:, 5], pool.latents[:, 0])


def test_allocated_blocks_hold_nothing_of_their_last_owner() -> None:
    pool = make_pool(2)
    blocks = pool.allocate(2)
    pool.latents.fill_(float("nan"))
    pool.release(blocks)
    pool.allocate(2)
    assert not pool.latents.any()


def test_threads_never_own_a_block_together() -> None:
    pool = make_pool(16)
    owners: Counter[int] = Counter()
    clashes: list[int] = []

    def churn() -> None:
        for _ in range(300):
            try:
                blocks = pool.allocate(5)
            except PoolExhausted:
                continue
            owners.update(blocks)
            clashes.extend(block for block in blocks if owners[block] != 1)
            owners.subtract(blocks)
            pool.release(blocks)

    threads = [threading.Thread(target=churn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    assert pool.num_free == 16
    pool.check_integrity()


class PoolAgainstModel(RuleBasedStateMachine):
    """No block is lost or doubly owned, and only committed content is ever found."""

    holdings = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(8)
        self.references: Counter[int] = Counter()

    @rule(target=holdings, n=st.integers(0, 5), token=st.integers(0, 2))
    def allocate(self, n: int, token: int) -> tuple[int, list[int]]:
        free = self.pool.num_free
        try:
            blocks = self.pool.allocate(n)
        except PoolExhausted:
            assert n > free
            return token, []
        assert len(set(blocks)) == n
        assert all(self.references[block] == 0 for block in blocks)
        self.references.update(blocks)
        # The content says what the block was computed for.
        for index, block in enumerate(blocks):
            self.pool.latents[:, block] = 10 * token + index
        return token, blocks

    @rule(holding=holdings)
    def commit(self, holding: tuple[int, list[int]]) -> None:
        token, blocks = holding
        for block, block_hash in zip(blocks, hashes_of(len(blocks), token), strict=True):
            self.pool.commit(block, block_hash)

    @rule(target=holdings, n=st.integers(1, 5), token=st.integers(0, 2))
    def claim(self, n: int, token: int) -> tuple[int, list[int]]:
        expected = self.pool.match(hashes_of(n, token))
        blocks = self.pool.claim(hashes_of(n, token))
        assert len(blocks) == expected
        for index, block in enumerate(blocks):
            assert bool((self.pool.latents[:, block] == 10 * token + index).all())
        self.references.update(blocks)
        return token, blocks

    @rule(holding=consumes(holdings))
    def release(self, holding: tuple[int, list[int]]) -> None:
        _, blocks = holding
        self.pool.release(blocks)
        self.references.subtract(blocks)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        held = sum(1 for count in self.references.values() if count > 0)
        assert self.pool.num_referenced == held
        assert self.pool.num_free == self.pool.num_blocks - held


PoolAgainstModel.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None
)
TestPoolAgainstModel = PoolAgainstModel.TestCase
