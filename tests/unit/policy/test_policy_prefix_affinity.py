"""The router's view of who holds which prefix: right while it fits, bounded when it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.blocks import chain_hashes, root_hash
from tidemill.policy import PrefixAffinity

ROOT = root_hash(b"model", "bfloat16", b"tenant")


def chain(*blocks: int) -> list[bytes]:
    """Hashes of a prompt whose blocks repeat one token each."""
    return chain_hashes(ROOT, [token for token in blocks for _ in range(64)])


prompts = st.lists(st.integers(1, 2), max_size=6)
records = st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), prompts), max_size=12)


def common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(first), len(second)))


@given(recorded=records, asked=prompts)
def test_overlap_is_the_longest_common_prefix_with_what_each_worker_was_sent(
    recorded: list[tuple[str, list[int]]], asked: list[int]
) -> None:
    affinity = PrefixAffinity()
    for worker, blocks in recorded:
        affinity.record(worker, chain(*blocks))
    expected: dict[str, int] = {}
    for worker, blocks in recorded:
        if length := common(blocks, asked):
            expected[worker] = max(expected.get(worker, 0), length)
    assert affinity.overlap(chain(*asked)) == expected


@given(recorded=records, limit=st.integers(1, 5))
def test_never_more_blocks_than_its_bound(
    recorded: list[tuple[str, list[int]]], limit: int
) -> None:
    affinity = PrefixAffinity(max_blocks=limit)
    for worker, blocks in recorded:
        affinity.record(worker, chain(*blocks))
        assert len(affinity) <= limit
        kept = affinity.overlap(chain(*blocks)).get(worker, 0)
        assert kept == min(limit, len(blocks))  # of the newest prompt the beginning is kept


def test_the_least_recently_recorded_prompt_goes_first() -> None:
    affinity = PrefixAffinity(max_blocks=4)
    affinity.record("a", chain(1, 2))
    affinity.record("a", chain(3, 4))
    affinity.record("b", chain(1, 2))
    affinity.record("a", chain(5))
    assert affinity.overlap(chain(1, 2)) == {"a": 2, "b": 2}
    assert affinity.overlap(chain(3, 4)) == {"a": 1}


def test_a_forgotten_worker_has_no_overlap_and_leaves_no_trace() -> None:
    affinity = PrefixAffinity()
    affinity.record("a", chain(1, 2))
    affinity.record("b", chain(1))
    affinity.forget("a")
    assert affinity.overlap(chain(1, 2)) == {"b": 1}
    affinity.forget("b")
    assert len(affinity) == 0


def test_another_tenants_prefix_is_no_overlap() -> None:
    affinity = PrefixAffinity()
    affinity.record("a", chain(1))
    others = chain_hashes(root_hash(b"model", "bfloat16", b"other"), [1] * 64)
    assert affinity.overlap(others) == {}


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_blocks must be at least 1"):
        PrefixAffinity(max_blocks=0)
