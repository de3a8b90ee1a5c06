"""Relieves the busiest GPU of a placement of experts, one small step after the other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

Badness = tuple[float, float]
"""Load of the busiest GPU, then the sum of all GPUs' squared loads: of two busiest, one helps."""

_GAIN = 1e-9  # relative; what rounding could feign is no gain


class Step(NamedTuple):
    """New contents of one slot, or of two that swap theirs; `num_moves` GPUs load an expert."""

    contents: tuple[tuple[int, int], ...]

    @property
    def num_moves(self) -> int:
        """Experts to be loaded."""
        return len(self.contents)


class PlacementSearch:
    """Improves `slots` in place. Experts stay on their island, every expert keeps a slot.

    A step is taken if it makes the placement less bad, and the best is taken first, so each busiest
    GPU is below the one before or there is one fewer of them.
    """

    def __init__(
        self, slots: Sequence[int], loads: Sequence[float], *, num_gpus: int, num_islands: int
    ) -> None:
        self.slots = list(slots)
        self._loads = loads
        self._gpu_slots = len(slots) // num_gpus
        self._island_gpus = num_gpus // num_islands
        self._where: list[list[int]] = [[] for _ in loads]
        for slot, expert in enumerate(slots):
            self._where[expert].append(slot)
        self._of_gpus = [sum(map(self._share, self._on(gpu))) for gpu in range(num_gpus)]

    @property
    def busiest(self) -> float:
        """Load of the busiest GPU."""
        return max(self._of_gpus)

    def run(self, max_moves: int) -> None:
        """Take steps while they help and load no more than `max_moves` experts together."""
        while max_moves > 0 and (step := self._best(max_moves)) is not None:
            self._take(step)
            max_moves -= step.num_moves

    def _best(self, max_moves: int) -> Step | None:
        ranked = sorted(range(len(self._of_gpus)), key=lambda gpu: -self._of_gpus[gpu])
        hot = ranked[0]
        squares = sum(load * load for load in self._of_gpus)
        best, found = (self._of_gpus[hot], squares * (1 - _GAIN)), None
        kinds = [self._copies(hot)] if max_moves < 2 else [self._copies(hot), self._swaps(hot)]
        for kind in kinds:
            for step, after in kind:
                bad = self._badness(after, ranked, squares)
                if bad < best:
                    best, found = bad, step
        return found

    def _badness(self, after: dict[int, float], ranked: list[int], squares: float) -> Badness:
        """If the GPUs in `after` had these loads."""
        rest = next((self._of_gpus[gpu] for gpu in ranked if gpu not in after), 0.0)
        for gpu, load in after.items():
            squares += load * load - self._of_gpus[gpu] ** 2
        return max(rest, *after.values()), squares

    def _swaps(self, hot: int) -> Iterator[tuple[Step, dict[int, float]]]:
        """Exchanges with another GPU that leave both below what the busiest has now."""
        high, held = self._of_gpus[hot], set(self._on(hot))
        for gpu in self._neighbours(hot):
            low, theirs = self._of_gpus[gpu], set(self._on(gpu))
            for slot in self._range(hot):
                given = self.slots[slot]
                if given in theirs:
                    continue
                share = self._share(given)
                for other in self._range(gpu):
                    taken = self.slots[other]
                    less = share - self._share(taken)
                    if 0 < less < high - low and taken not in held:
                        yield (
                            Step(((slot, taken), (other, given))),
                            {hot: high - less, gpu: low + less},
                        )

    def _copies(self, hot: int) -> Iterator[tuple[Step, dict[int, float]]]:
        """One expert more often and another less: the busiest GPU's own, or one of its slots."""
        held = set(self._on(hot))
        for gpu in self._neighbours(hot):
            theirs = set(self._on(gpu))
            for slot in self._range(gpu):
                if len(self._where[self.slots[slot]]) > 1:
                    for expert in held - theirs:
                        yield from self._copy(hot, slot, expert)
        for slot in self._range(hot):
            if len(self._where[self.slots[slot]]) > 1:
                for expert in self._island_experts(hot) - held:
                    yield from self._copy(hot, slot, expert)

    def _copy(self, hot: int, slot: int, expert: int) -> Iterator[tuple[Step, dict[int, float]]]:
        """`expert` instead of one copy of another, if no GPU is then above the busiest."""
        gpu, gone = slot // self._gpu_slots, self.slots[slot]
        come, leave = self._where[expert], self._where[gone]
        share = self._loads[expert] / (len(come) + 1)
        limit, change = self._of_gpus[hot], share - self._share(gone)
        if self._of_gpus[gpu] + change >= limit:
            return
        after = {gpu: self._of_gpus[gpu] + change}
        for each, delta in (
            (come, share - self._share(expert)),
            (leave, self._loads[gone] / (len(leave) - 1) - self._share(gone)),
        ):
            for other in each:
                if other != slot:
                    its = other // self._gpu_slots
                    after[its] = after.get(its, self._of_gpus[its]) + delta
        yield Step(((slot, expert),)), after

    def _take(self, step: Step) -> None:
        touched = set()
        for slot, expert in step.contents:
            gone = self.slots[slot]
            self._where[gone].remove(slot)
            self._where[expert].append(slot)
            self.slots[slot] = expert
            touched |= {gone, expert}
        for gpu in {slot // self._gpu_slots for expert in touched for slot in self._where[expert]}:
            self._of_gpus[gpu] = sum(map(self._share, self._on(gpu)))

    def _share(self, expert: int) -> float:
        return self._loads[expert] / len(self._where[expert])

    def _range(self, gpu: int) -> range:
        return range(gpu * self._gpu_slots, (gpu + 1) * self._gpu_slots)

    def _on(self, gpu: int) -> list[int]:
        return self.slots[gpu * self._gpu_slots : (gpu + 1) * self._gpu_slots]

    def _neighbours(self, gpu: int) -> Iterator[int]:
        first = gpu // self._island_gpus * self._island_gpus
        return (each for each in range(first, first + self._island_gpus) if each != gpu)

    def _island_experts(self, gpu: int) -> set[int]:
        first = gpu // self._island_gpus * self._island_gpus * self._gpu_slots
        return set(self.slots[first : first + self._island_gpus * self._gpu_slots])
