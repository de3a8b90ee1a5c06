"""Which GPU holds which experts of a mixture-of-experts layer, and which of them twice.

Under expert parallelism a layer takes as long as its busiest GPU, and some experts are always hot.
`place_experts` follows the outline of DeepSeek's EPLB, and gives what its published example gives:
hot experts get further copies, and copies are packed so that GPUs end up with equal loads.

    topology = Topology(num_slots=16, num_gpus=8, num_nodes=2, num_groups=4)
    loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    place_experts(loads, topology)  # (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1)

A GPU can take a new expert only by loading its weights, so `move_experts` starts from where experts
lie and changes no more than it is allowed to. Everything here is about one layer: layers are
placed independently. How loads are predicted is not decided here.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tidemill.policy.placement_search import PlacementSearch

Slots = tuple[int, ...]
"""The expert in every slot; GPUs, and within them nodes, hold equal consecutive runs of slots."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Where experts may lie: `num_slots` over `num_gpus` GPUs in `num_nodes` nodes.

    `num_groups` are the equal runs of experts among which a router picks first (V3's n_group).
    Where nodes divide them evenly, groups are kept whole on a node (the hierarchical policy, for
    prefill), so that a token that goes to few groups goes to few nodes. Otherwise nodes and
    groups do not matter (the global policy, for wide decode). ValueError for sizes that do not
    divide.
    """

    num_slots: int
    num_gpus: int
    num_nodes: int = 1
    num_groups: int = 1

    def __post_init__(self) -> None:
        if min(self.num_slots, self.num_gpus, self.num_nodes, self.num_groups) < 1:
            raise ValueError("a topology has at least one slot, GPU, node and group")
        if self.num_slots % self.num_gpus or self.num_gpus % self.num_nodes:
            raise ValueError("GPUs must divide slots evenly, and nodes GPUs")

    @property
    def num_islands(self) -> int:
        """Parts between which no expert is shared: nodes, or one if groups cannot be kept whole."""
        return 1 if self.num_groups % self.num_nodes else self.num_nodes

    @property
    def slots_per_gpu(self) -> int:
        """Experts that each GPU holds."""
        return self.num_slots // self.num_gpus


def place_experts(loads: Sequence[float], topology: Topology) -> Slots:
    """A placement from nothing: `loads` are tokens by expert, each expert gets a slot or more.

    Groups to islands, copies of hot experts within an island, copies to its GPUs. Raises ValueError
    if experts are more than slots, groups do not divide them, or a load is negative.
    """
    _check(loads, topology)
    placed: list[int] = []
    gpus_per_island = topology.num_gpus // topology.num_islands
    for experts in _experts_of_islands(loads, topology):
        copies = _replicate(loads, experts, topology.num_slots // topology.num_islands)
        shares = _shares(loads, copies)
        for gpu in _pack([shares[expert] for expert in copies], gpus_per_island):
            placed += [copies[index] for index in gpu]
    return tuple(placed)


def move_experts(
    current: Sequence[int], loads: Sequence[float], topology: Topology, *, max_moves: int
) -> Slots:
    """The best placement found from which `current` differs by at most `max_moves` loaded experts.

    The busiest GPU is relieved step by step: it swaps an expert with another GPU of its island, or
    the number of copies of two experts changes. If a placement from nothing is within reach and
    better, it is that. The busiest GPU's load never grows, and more moves never make it worse.
    """
    _check(loads, topology)
    search = PlacementSearch(
        current, loads, num_gpus=topology.num_gpus, num_islands=topology.num_islands
    )
    search.run(max_moves)
    fresh = _relabelled(place_experts(loads, topology), current, topology)
    within_reach = num_moves(current, fresh, topology) <= max_moves
    if within_reach and max(gpu_loads(fresh, loads, topology)) < search.busiest:
        return fresh
    return tuple(search.slots)


def gpu_loads(slots: Sequence[int], loads: Sequence[float], topology: Topology) -> list[float]:
    """Load of every GPU if all copies of an expert get equal shares of its tokens."""
    shares = _shares(loads, slots)
    return [sum(shares[expert] for expert in gpu) for gpu in _gpus(slots, topology)]


def balancedness(slots: Sequence[int], loads: Sequence[float], topology: Topology) -> float:
    """Mean over greatest load of a GPU: 1 is even, and 1/x says that the layer takes x as long."""
    of_gpus = gpu_loads(slots, loads, topology)
    greatest = max(of_gpus)
    return sum(of_gpus) / len(of_gpus) / greatest if greatest else 1.0


def num_moves(before: Sequence[int], after: Sequence[int], topology: Topology) -> int:
    """Experts whose weights some GPU has to load to get from one placement to the other."""
    pairs = zip(_gpus(before, topology), _gpus(after, topology), strict=True)
    return sum(len(set(new) - set(old)) for old, new in pairs)


def _check(loads: Sequence[float], topology: Topology) -> None:
    if len(loads) > topology.num_slots:
        raise ValueError(f"{len(loads)} experts do not fit {topology.num_slots} slots")
    if topology.num_islands > 1 and len(loads) % topology.num_groups:
        raise ValueError(f"{topology.num_groups} groups do not divide {len(loads)} experts")
    if not loads or min(loads) < 0:
        raise ValueError("loads must be given, and none below 0")


def _gpus(slots: Sequence[int], topology: Topology) -> Iterator[Sequence[int]]:
    size = topology.slots_per_gpu
    return (slots[start : start + size] for start in range(0, topology.num_slots, size))


def _shares(loads: Sequence[float], slots: Sequence[int]) -> list[float]:
    """Load of one copy of each expert."""
    counts = [0] * len(loads)
    for expert in slots:
        counts[expert] += 1
    return [load / max(count, 1) for load, count in zip(loads, counts, strict=True)]


def _experts_of_islands(loads: Sequence[float], topology: Topology) -> list[list[int]]:
    """Whole groups, so that islands have equal loads."""
    if topology.num_islands == 1:
        return [list(range(len(loads)))]
    size = len(loads) // topology.num_groups
    groups = [list(range(first, first + size)) for first in range(0, len(loads), size)]
    packs = _pack([sum(loads[e] for e in group) for group in groups], topology.num_islands)
    return [[expert for index in pack for expert in groups[index]] for pack in packs]


def _replicate(loads: Sequence[float], experts: Sequence[int], num_slots: int) -> list[int]:
    """Every expert once, then again and again the one whose copies have most to do."""
    copies = list(experts)
    hottest = [(-loads[expert], place, 1) for place, expert in enumerate(experts)]
    heapq.heapify(hottest)
    while len(copies) < num_slots:
        _, place, count = hottest[0]
        expert = experts[place]
        copies.append(expert)
        heapq.heapreplace(hottest, (-loads[expert] / (count + 1), place, count + 1))
    return copies


def _pack(weights: Sequence[float], num_packs: int) -> list[list[int]]:
    """Indices in packs of equal number: the heaviest left goes to the lightest with room."""
    capacity = len(weights) // num_packs
    if capacity == 1:
        return [[index] for index in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    with_room = [(0.0, pack) for pack in range(num_packs)]
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        weight, pack = with_room[0]
        packs[pack].append(index)
        if len(packs[pack]) < capacity:
            heapq.heapreplace(with_room, (weight + weights[index], pack))
        else:
            heapq.heappop(with_room)
    return packs


def _relabelled(fresh: Slots, current: Sequence[int], topology: Topology) -> Slots:
    """`fresh`, its islands, GPUs and slots renumbered to have most in common with `current`."""
    num_islands, num_gpus = topology.num_islands, topology.num_gpus // topology.num_islands
    size = topology.num_slots // num_islands
    old_islands = [current[start : start + size] for start in range(0, len(current), size)]
    new_islands = [fresh[start : start + size] for start in range(0, len(fresh), size)]
    placed: list[int] = []
    for old, new in zip(old_islands, _matched(old_islands, new_islands), strict=True):
        width = size // num_gpus
        old_gpus = [old[start : start + width] for start in range(0, size, width)]
        new_gpus = [new[start : start + width] for start in range(0, size, width)]
        for old_gpu, new_gpu in zip(old_gpus, _matched(old_gpus, new_gpus), strict=True):
            placed += _in_old_slots(old_gpu, new_gpu)
    return tuple(placed)


def _matched(old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """`new` in the order of `old`, those with most in common paired first."""
    sets = [set(experts) for experts in new]
    pairs = sorted(
        (-len(sets[to].intersection(experts)), of, to)
        for of, experts in enumerate(old)
        for to in range(len(new))
    )
    partner: dict[int, int] = {}
    taken: set[int] = set()
    for _, of, to in pairs:
        if of not in partner and to not in taken:
            partner[of] = to
            taken.add(to)
    return [new[partner[of]] for of in range(len(old))]


def _in_old_slots(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """`new` with each expert that stays in the slot that it had."""
    rest = list(new)
    kept: list[int | None] = []
    for expert in old:
        stays = expert in rest
        kept.append(expert if stays else None)
        if stays:
            rest.remove(expert)
    coming = iter(rest)
    return [next(coming) if expert is None else expert for expert in kept]
