"""The prefix index knows what workers hold from what they tell, whatever is lost on the way."""

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.policy import KvChange, PrefixIndex, TierOverlap

BELIEVE_S = 10.0


class Listening:
    """An index, and workers that tell it of changes one by one."""

    def __init__(self, *workers: str) -> None:
        self.index = PrefixIndex(believe_s=BELIEVE_S)
        self._sequences: dict[str, int] = {}
        for worker in workers:
            self.begin(worker)

    def begin(self, worker: str, *names: int) -> None:
        self._sequences[worker] = 1
        changes = [KvChange(names)] if names else []
        assert self.index.hear(worker, changes, epoch=1, sequence=1, resets=True)

    def tell(self, worker: str, *names: int, host: bool = False, removed: bool = False) -> None:
        self._sequences[worker] += 1
        change = KvChange(names, host=host, removed=removed)
        assert self.index.hear(worker, [change], epoch=1, sequence=self._sequences[worker])

    def overlap(self, *names: int, now: float = 0.0) -> dict[str, TierOverlap]:
        return self.index.overlap(names, now)

    def blocks(self, *names: int, now: float = 0.0) -> dict[str, int]:
        return {worker: each.blocks for worker, each in self.overlap(*names, now=now).items()}


def test_each_worker_has_its_own_leading_blocks() -> None:
    it = Listening("a", "b", "c")
    it.tell("a", 1, 2, 3)
    it.tell("b", 1)
    it.tell("b", 7, 8)
    assert it.blocks(1, 2, 3, 4) == {"a": 3, "b": 1}
    assert it.blocks(7) == {"b": 1}
    assert it.blocks(2, 3) == {"a": 2}
    assert it.blocks(9, 1, 2) == {}
    assert it.blocks() == {}


def test_blocks_in_host_memory_are_told_apart() -> None:
    it = Listening("a", "b")
    it.tell("a", 1, 2, 3, 4)
    it.tell("b", 1, 2)
    it.tell("a", 4, 3, removed=True)
    it.tell("a", 4, 3, host=True)
    assert it.overlap(1, 2, 3, 4, 5) == {"a": TierOverlap(2, 2), "b": TierOverlap(2, 0)}
    it.tell("a", 1, host=True)  # in both tiers: on the device
    assert it.overlap(1, 2, 3) == {"a": TierOverlap(2, 1), "b": TierOverlap(2, 0)}
    it.tell("a", 4, host=True, removed=True)
    it.tell("a", 2, 1, removed=True)
    assert it.overlap(1, 2) == {"b": TierOverlap(2, 0), "a": TierOverlap(0, 1)}


def test_what_is_evicted_everywhere_costs_nothing_more() -> None:
    it = Listening("a", "b")
    for worker in ("a", "b"):
        it.tell(worker, *range(100))
    for worker in ("a", "b"):
        it.tell(worker, *range(100), removed=True)
        it.tell(worker, 5, removed=True)  # no harm in hearing it twice
    assert len(it.index) == 0


def test_a_worker_that_left_holds_nothing_and_its_place_is_used_again() -> None:
    it = Listening("a", "b")
    it.tell("a", *range(50))
    it.tell("b", *range(10))
    it.index.forget("a")
    assert it.index.heard("a") is None
    assert it.blocks(*range(50)) == {"b": 10}
    for round_ in range(20):
        it.begin(f"c{round_}", *range(20, 30))
        assert it.blocks(*range(20, 40)) == {f"c{round_}": 10}
        it.tell("b", *range(1000, 1060))  # what comes sweeps away what is gone
        it.tell("b", *range(1000, 1060), removed=True)
        it.index.forget(f"c{round_}")
    it.tell("b", *range(1000, 1060))
    assert len(it.index) == 70
    assert max(it.index._held.values()) < 1 << 8  # the masks did not grow with each newcomer
    it.index.forget("nobody")


def test_a_restarted_worker_begins_empty() -> None:
    it = Listening("a")
    it.tell("a", 1, 2, 3)
    assert it.index.heard("a") == (1, 2)
    assert it.index.hear("a", [KvChange([2])], epoch=2, sequence=1, resets=True)
    assert it.index.heard("a") == (2, 1)
    assert it.blocks(1, 2) == {}
    assert it.blocks(2) == {"a": 1}


def test_a_gap_is_refused_and_a_replay_passed_over() -> None:
    it = Listening("a")
    it.tell("a", 1)
    assert not it.index.hear("a", [KvChange([2])], epoch=1, sequence=4)
    assert not it.index.hear("a", [KvChange([2])], epoch=2, sequence=3)
    assert not it.index.hear("b", [KvChange([2])], epoch=1, sequence=1)
    assert it.index.heard("a") == (1, 2)
    assert it.index.hear("a", [KvChange([1], removed=True)], epoch=1, sequence=2)
    assert it.blocks(1, 2) == {"a": 1}
    assert it.index.hear("a", [KvChange([2])], epoch=1, sequence=3)
    assert it.blocks(1, 2) == {"a": 2}


def test_what_was_dispatched_counts_as_held_for_a_while() -> None:
    it = Listening("a", "b")
    it.tell("a", 1)
    it.index.expect(["a"], [1, 2, 3], now=100.0)
    it.index.expect(["b"], [1, 2], now=105.0)
    assert it.overlap(1, 2, 3, 4, now=105.0) == {"a": TierOverlap(3), "b": TierOverlap(2)}
    assert it.blocks(1, 2, 3, now=100.0 + BELIEVE_S) == {"a": 1, "b": 2}
    it.tell("b", 1, 2)
    assert it.blocks(1, 2, 3, now=105.0 + BELIEVE_S) == {"a": 1, "b": 2}
    assert not it.index._believed


def test_nothing_is_believed_of_who_left_or_never_told() -> None:
    it = Listening("a", "b")
    it.index.expect(["a", "b"], [1], now=0.0)
    it.index.expect(["a", "c"], [1, 2], now=0.0)
    it.index.forget("a")
    it.begin("d")
    assert it.blocks(1, 2) == {"b": 1}
    assert it.index._believed.keys() == {1}


def test_it_is_known_how_many_asked_for_the_same_lately() -> None:
    it = Listening("a", "b")
    it.tell("a", 1, 2)
    for at in range(3):
        it.index.expect(["a", "b"], [1, 2, 10 + at], now=float(at))
    it.index.expect(["b"], [1, 20], now=3.0)

    def alike(*names: int, now: float) -> int:
        return it.index.num_alike(names, it.overlap(*names, now=now))

    assert alike(1, 2, 30, now=3.0) == 3
    assert alike(1, 30, now=3.0) == 4
    assert alike(1, 2, 11, now=3.0) == 1  # the longest overlap is that one's
    assert alike(9, now=3.0) == 0
    assert alike(1, 2, 30, now=1.0 + BELIEVE_S) == 1
    assert alike(1, 2, 30, now=3.0 + BELIEVE_S) == 0
    assert not it.index._dispatched


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 64, 65, 1000])
def test_every_length_is_found(num_blocks: int) -> None:
    chain = list(range(1, 1 + num_blocks))
    for length in {1, 2, num_blocks // 2, num_blocks - 1, num_blocks} - {0}:
        it = Listening("a", "b")
        it.begin("a", *chain[:length])
        it.begin("b", *chain[: length // 2])
        expected = {"a": min(length, num_blocks), "b": min(length // 2, num_blocks)}
        assert it.blocks(*chain) == {who: each for who, each in expected.items() if each}


CHAINS = [[100 * chain + index for index in range(12)] for chain in range(3)]
TIERS = (False, True)  # device, host


@dataclass
class Holder:
    """A worker with a plain set for each tier, whose pool never leaves a hole in a chain.

    It logs what it tells; `num_kept` of the last messages can be told again.
    """

    epoch: int
    held: dict[bool, set[int]] = field(default_factory=lambda: {False: set(), True: set()})
    log: list[list[KvChange]] = field(default_factory=list)  # from sequence 1 on

    def change(self, names: list[int], *, host: bool, removed: bool) -> KvChange:
        now = self.held[host]
        self.held[host] = now - set(names) if removed else now | set(names)
        return KvChange(names, host=host, removed=removed)

    def lengths(self, chain: list[int]) -> tuple[int, int]:
        """How many leading blocks lie on the device, and in any tier."""
        device, host = self.held[False], self.held[True]
        on_device = next((i for i, name in enumerate(chain) if name not in device), len(chain))
        either = device | host
        return on_device, next((i for i, n in enumerate(chain) if n not in either), len(chain))

    def act(self, chain: list[int], what: str, number: int) -> None:
        on_device, anywhere = self.lengths(chain)
        if what == "compute":
            changes = [self.change(chain[: max(number, 1)], host=False, removed=False)]
        elif what == "demote":
            moved = chain[min(number, on_device) : on_device][::-1]
            changes = [
                self.change(moved, host=False, removed=True),
                self.change(moved, host=True, removed=False),
            ]
        else:
            gone = chain[max(number, on_device) : anywhere][::-1]
            changes = [self.change(gone, host=True, removed=True)]
        self.log.append([each for each in changes if each.blocks])


def listen(index: PrefixIndex, worker: str, holder: Holder, rng: Random, *, lossy: bool) -> None:
    """What a link does: resume after what was heard, or hear all; lossy, it may miss any of it."""
    heard = index.heard(worker)
    if heard is None or heard[0] != holder.epoch or rng.random() < 0.2:
        held = [KvChange(sorted(holder.held[host]), host=host) for host in TIERS]
        holder.log.append([])
        sequence = len(holder.log)
        index.hear(worker, held, epoch=holder.epoch, sequence=sequence, resets=True)
        return
    first = heard[1]
    if rng.random() < 0.3:
        first = max(first - 2, 0)  # told again
    for sequence, changes in enumerate(holder.log[first:], start=first + 1):
        if lossy and rng.random() < 0.2:
            continue
        if not index.hear(worker, changes, epoch=holder.epoch, sequence=sequence):
            assert lossy
            return


STEPS = st.tuples(
    st.sampled_from(["compute", "demote", "drop", "listen", "listen", "restart", "leave"]),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 12),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=60), st.integers(0, 2**32))
def test_the_index_agrees_with_plain_sets_whatever_is_lost_repeated_or_restarted(
    steps: list[tuple[str, int, int, int]], seed: int
) -> None:
    rng = Random(seed)
    index = PrefixIndex()
    holders = {f"w{number}": Holder(epoch=number) for number in range(4)}
    for what, who, chain, number in steps:
        worker = f"w{who}"
        if what == "listen":
            listen(index, worker, holders[worker], rng, lossy=True)
        elif what == "restart":
            holders[worker] = Holder(epoch=rng.getrandbits(64))
        elif what == "leave":
            index.forget(worker)
        else:
            holders[worker].act(CHAINS[chain], what, number)
    for worker, holder in holders.items():
        listen(index, worker, holder, rng, lossy=False)
    for names in CHAINS:
        truth = {worker: holder.lengths(names) for worker, holder in holders.items()}
        assert index.overlap(names, 0.0) == {
            worker: TierOverlap(on_device, anywhere - on_device)
            for worker, (on_device, anywhere) in truth.items()
            if anywhere
        }
    for worker, holder in holders.items():
        for host in TIERS:
            index.hear(
                worker,
                [KvChange(sorted(holder.held[host]), host=host, removed=True)],
                epoch=holder.epoch,
                sequence=(index.heard(worker) or (0, 0))[1] + 1,
            )
    assert all(index.overlap(names, 0.0) == {} for names in CHAINS)
