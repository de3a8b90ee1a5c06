"""Placing experts: EPLB's published example, what always holds, and bounded moves."""

from collections import Counter
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.policy import (
    Topology,
    balancedness,
    gpu_loads,
    move_experts,
    num_moves,
    place_experts,
)
from tidemill.policy.placement import Slots

EXAMPLE = Topology(num_slots=16, num_gpus=8, num_nodes=2, num_groups=4)
PREFILL = Topology(num_slots=288, num_gpus=32, num_nodes=4, num_groups=8)
DECODE = Topology(num_slots=288, num_gpus=144, num_nodes=18, num_groups=8)


class Case(NamedTuple):
    topology: Topology
    loads: list[float]
    later: list[float]

    @property
    def placed(self) -> Slots:
        return place_experts(self.loads, self.topology)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few and many of everything; loads, and what they have become later."""
    num_nodes = draw(st.integers(1, 4))
    num_gpus = num_nodes * draw(st.integers(1, 4))
    num_groups = draw(st.sampled_from([1, 2, 4]))
    num_experts = num_groups * draw(st.integers(1, 8))
    per_gpu = -(-num_experts // num_gpus) + draw(st.integers(0, 2))
    topology = Topology(per_gpu * num_gpus, num_gpus, num_nodes, num_groups)
    load = st.one_of(st.integers(0, 1000).map(float), st.floats(0, 1e9))
    row = st.lists(load, min_size=num_experts, max_size=num_experts)
    return Case(topology, draw(row), draw(row))


def skewed(seed: int) -> list[float]:
    rng = Random(seed)
    return [rng.lognormvariate(0, 1) for _ in range(256)]


def drifted(loads: list[float], seed: int) -> list[float]:
    rng = Random(seed)
    return [load * rng.lognormvariate(0, 0.3) for load in loads]


def nodes_of(slots: Slots, topology: Topology) -> dict[int, set[int]]:
    """The nodes on which each expert lies."""
    per_node = topology.num_slots // topology.num_nodes
    nodes: dict[int, set[int]] = {}
    for slot, expert in enumerate(slots):
        nodes.setdefault(expert, set()).add(slot // per_node)
    return nodes


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        (
            (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
            (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
        ),
        (
            (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
            (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
        ),
    ],
)
def test_eplbs_published_example_comes_out_exactly(
    loads: tuple[float, ...], expected: Slots
) -> None:
    assert place_experts(loads, EXAMPLE) == expected


def test_groups_that_nodes_do_not_divide_are_placed_as_if_there_were_none() -> None:
    loads = skewed(0)
    assert DECODE.num_islands == 1
    assert place_experts(loads, DECODE) == place_experts(loads, Topology(288, 144))


def test_a_copy_goes_where_it_relieves_most() -> None:
    assert Counter(place_experts([60, 20, 20], Topology(5, 5))) == {0: 3, 1: 1, 2: 1}


def test_redundant_copies_even_out_what_experts_in_order_cannot() -> None:
    """The figures of 32 redundant copies at EP32 and EP144 (benchmarks/policy/placement.py)."""
    layers = [skewed(seed) for seed in range(8)]

    def even(topology: Topology) -> float:
        placed = [balancedness(place_experts(each, topology), each, topology) for each in layers]
        return sum(placed) / len(placed)

    in_order = [balancedness(range(256), each, Topology(256, 32)) for each in layers]
    assert sum(in_order) / len(in_order) < 0.6
    assert even(PREFILL) > 0.92
    assert even(DECODE) > 0.7


@given(cases())
def test_every_expert_has_a_slot_and_every_slot_an_expert(case: Case) -> None:
    placed = case.placed
    assert len(placed) == case.topology.num_slots
    assert set(placed) == set(range(len(case.loads)))


@given(cases())
def test_a_group_lies_on_one_node_where_nodes_divide_groups(case: Case) -> None:
    topology = case.topology
    if topology.num_groups % topology.num_nodes:
        return
    nodes = nodes_of(case.placed, topology)
    size = len(case.loads) // topology.num_groups
    for first in range(0, len(case.loads), size):
        assert len(set.union(*(nodes[expert] for expert in range(first, first + size)))) == 1


@given(cases())
def test_no_load_is_lost_in_copies(case: Case) -> None:
    total = sum(gpu_loads(case.placed, case.loads, case.topology))
    assert total == pytest.approx(sum(case.loads))
    assert 0 < balancedness(case.placed, case.loads, case.topology) <= 1 + 1e-9


@settings(max_examples=60)
@given(cases(), st.integers(0, 12))
def test_moves_are_bounded_and_never_for_the_worse(case: Case, max_moves: int) -> None:
    topology, later, placed = case.topology, case.later, case.placed
    moved = move_experts(placed, later, topology, max_moves=max_moves)
    assert num_moves(placed, moved, topology) <= max_moves
    assert set(moved) == set(range(len(later)))
    before, after = gpu_loads(placed, later, topology), gpu_loads(moved, later, topology)
    assert max(after) <= max(before) * (1 + 1e-9)


@settings(max_examples=60)
@given(cases())
def test_moves_leave_experts_on_their_node_or_are_a_placement_of_groups(case: Case) -> None:
    topology = case.topology
    if topology.num_islands == 1:
        return
    moved = move_experts(case.placed, case.later, topology, max_moves=4)
    assert all(len(nodes) == 1 for nodes in nodes_of(moved, topology).values())


def test_no_moves_change_nothing() -> None:
    loads = skewed(1)
    placed = place_experts(loads, PREFILL)
    assert move_experts(placed, drifted(loads, 2), PREFILL, max_moves=0) == placed


@pytest.mark.parametrize("topology", [PREFILL, DECODE])
def test_a_few_moves_get_most_of_what_placing_anew_would(topology: Topology) -> None:
    loads = skewed(3)
    later = drifted(loads, 4)
    placed = place_experts(loads, topology)
    stay = balancedness(placed, later, topology)
    fresh = balancedness(place_experts(later, topology), later, topology)
    after = [
        balancedness(move_experts(placed, later, topology, max_moves=most), later, topology)
        for most in (4, 8, 16)
    ]
    assert [stay, *after] == sorted([stay, *after])
    assert after[-1] - stay > 0.6 * (fresh - stay)
    assert num_moves(placed, place_experts(later, topology), topology) > 200


def test_with_moves_enough_it_is_never_worse_than_placing_anew() -> None:
    loads = skewed(5)
    placed = place_experts(loads, DECODE)
    later = skewed(6)
    moved = move_experts(placed, later, DECODE, max_moves=288)
    fresh = place_experts(later, DECODE)
    assert balancedness(moved, later, DECODE) >= balancedness(fresh, later, DECODE)


def test_a_placement_from_nothing_is_renumbered_to_spare_moves() -> None:
    """The same experts on other GPUs of other nodes are no reason to load anything."""
    loads = skewed(7)
    placed = place_experts(loads, PREFILL)
    half = len(placed) // 2
    elsewhere = placed[half:] + placed[:half]
    assert num_moves(elsewhere, placed, PREFILL) > 200
    moved = move_experts(elsewhere, loads, PREFILL, max_moves=288)
    assert num_moves(elsewhere, moved, PREFILL) < 60


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (9, 2, 1, 1), (8, 4, 3, 1), (8, 4, 1, 0)], ids=str)
def test_sizes_that_do_not_divide_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="GPU"):
        Topology(*sizes)


@pytest.mark.parametrize(
    ("loads", "why"),
    [([1.0] * 17, "fit"), ([1.0] * 10, "divide"), ([], "given"), ([-1.0], "below")],
)
def test_loads_that_cannot_be_placed_are_refused(loads: list[float], why: str) -> None:
    topology = EXAMPLE if len(loads) > 1 else Topology(16, 8)
    with pytest.raises(ValueError, match=why):
        place_experts(loads, topology)
