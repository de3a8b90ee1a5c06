"""Which worker holds which KV blocks, from what the workers tell: the router's prefix index.

One dict from a block's name to a mask of who holds it: two bits for each worker, device and host.
What comes and goes does so in batches, which pass through the dict without a Python step for each
block. A pool evicts a chain from its end, so a block outlives those that follow it, and who holds
it holds all before it: a question about a prompt looks up a few of its blocks, not all.

What was dispatched is believed to be held for a while, until the worker tells: requests that share
a prompt arrive together.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice, repeat
from operator import or_

from tidemill.policy.load import TierOverlap

_BITS = 2  # a worker's, in a mask
_DEVICE, _HOST = 0b01, 0b10
_SWEEP = 4  # names looked at for each one that comes, while masks name workers that are gone


@dataclass(frozen=True, slots=True)
class KvChange:
    """Blocks that came to a worker's device or host tier, or left it, by their names."""

    blocks: Sequence[int]
    host: bool = False
    removed: bool = False


@dataclass(slots=True)
class _Feed:
    """How far a worker has told. `shift` is the place of its bits."""

    shift: int
    epoch: int
    sequence: int


class PrefixIndex:
    """Blocks by name (`tidemill.blocks.block_names`), whatever model or tenant they belong to.

    Names of different roots differ, so nobody's question meets another's blocks. An answer may be
    wrong where a pool has a hole, which is rare: two prompts computed the same block at one time,
    and the one that was kept went first. That costs a recompute and nothing else. Not thread-safe.

    `believe_s`: how long a dispatched prompt counts as held, unless the worker tells sooner.
    """

    def __init__(self, *, believe_s: float = 10.0) -> None:
        self._believe_s = believe_s
        self._held: dict[int, int] = {}
        self._feeds: dict[str, _Feed] = {}
        self._worker_at: dict[int, str] = {}  # by its device bit
        self._device_bits = 0  # of all workers that are there
        self._free_shifts: list[int] = []
        self._stale: list[int] = []  # shifts of those that are gone, whose bits may still be set
        self._sweep: Iterator[int] = iter(())
        self._believed: dict[int, int] = {}
        self._dispatched: Counter[int] = Counter()
        self._beliefs: deque[tuple[float, int, Sequence[int]]] = deque()

    def __len__(self) -> int:
        """Blocks known, those of workers that left and are not yet swept included."""
        return len(self._held)

    def heard(self, worker_id: str) -> tuple[int, int] | None:
        """Epoch and sequence of the last message taken in from the worker; None: none."""
        feed = self._feeds.get(worker_id)
        return None if feed is None else (feed.epoch, feed.sequence)

    def hear(
        self,
        worker_id: str,
        changes: Iterable[KvChange],
        *,
        epoch: int,
        sequence: int,
        resets: bool = False,
    ) -> bool:
        """Take in a message. False: others before it are missing, and nothing was taken.

        What was heard already is passed over. `resets` begins anew with this message.
        """
        if resets:
            self.forget(worker_id)
            feed = self._feeds[worker_id] = _Feed(self._place(), epoch, sequence)
            self._worker_at[1 << feed.shift] = worker_id
            self._device_bits |= 1 << feed.shift
        else:
            known = self._feeds.get(worker_id)
            if known is None or epoch != known.epoch or sequence > known.sequence + 1:
                return False
            feed = known
            if sequence <= feed.sequence:
                return True
            feed.sequence = sequence
        for change in changes:
            bit = (_HOST if change.host else _DEVICE) << feed.shift
            if change.removed:
                _clear(self._held, bit, change.blocks)
                continue
            _set(self._held, bit, change.blocks)
            if self._stale:
                self._sweep_some(_SWEEP * len(change.blocks))
        return True

    def expect(self, worker_ids: Iterable[str], names: Sequence[int], now: float) -> None:
        """A request was dispatched: these workers will hold its blocks soon.

        Times are seconds of one clock, never going back.
        """
        feeds = [feed for each in worker_ids if (feed := self._feeds.get(each)) is not None]
        bits = reduce(or_, (_DEVICE << feed.shift for feed in feeds), 0)
        _set(self._believed, bits, names)
        self._dispatched.update(names)
        self._beliefs.append((now + self._believe_s, bits, names))

    def overlap(self, names: Sequence[int], now: float) -> dict[str, TierOverlap]:
        """Leading blocks of the chain that each worker holds; workers with none are left out."""
        self._expire(now)
        held, believed, present = self._held, self._believed, self._device_bits

        def on_device(index: int) -> int:
            name = names[index]
            return (held.get(name, 0) | believed.get(name, 0)) & present

        def anywhere(index: int) -> int:
            mask = held.get(names[index], 0)
            return (mask | mask >> 1 | believed.get(names[index], 0)) & present

        lengths = dict(_lengths(anywhere, len(names)))
        device = dict(_lengths(on_device, len(names))) if lengths else {}
        return {
            self._worker_at[bit]: TierOverlap(num_device := device.get(bit, 0), num - num_device)
            for bit, num in lengths.items()
        }

    def num_alike(self, names: Sequence[int], overlap: Mapping[str, TierOverlap]) -> int:
        """How many requests dispatched lately begin with the longest of these overlaps."""
        longest = max((each.blocks for each in overlap.values()), default=0)
        return self._dispatched[names[longest - 1]] if longest else 0

    def forget(self, worker_id: str) -> None:
        """Drop a worker that is gone, or restarted empty. Its bits are swept away by and by."""
        feed = self._feeds.pop(worker_id, None)
        if feed is None:
            return
        bit = _DEVICE << feed.shift
        del self._worker_at[bit]
        self._device_bits ^= bit
        for index, (until, bits, names) in enumerate(self._beliefs):
            if bits & bit:
                _clear(self._believed, bit, names)
                self._beliefs[index] = (until, bits ^ bit, names)
        self._stale.append(feed.shift)
        self._sweep = iter(list(self._held))

    def _place(self) -> int:
        """A shift that no mask uses."""
        if self._free_shifts:
            return self._free_shifts.pop()
        return (len(self._feeds) + len(self._stale)) * _BITS

    def _sweep_some(self, limit: int) -> None:
        """Clear bits of workers that are gone from so many masks; after the last, reuse them."""
        stale = sum((_DEVICE | _HOST) << shift for shift in self._stale)
        names = list(islice(self._sweep, limit))
        found = [name for name in names if self._held.get(name, 0) & stale]
        _clear(self._held, stale, found)
        if len(names) < limit:
            self._free_shifts += self._stale
            self._stale.clear()

    def _expire(self, now: float) -> None:
        while self._beliefs and self._beliefs[0][0] <= now:
            _, bits, names = self._beliefs.popleft()
            _clear(self._believed, bits, names)
            self._dispatched.subtract(names)
            for name in names:
                if not self._dispatched[name]:
                    del self._dispatched[name]


def _lengths(holders: Callable[[int], int], num_blocks: int) -> Iterator[tuple[int, int]]:
    """For each of those who hold block 0, its bit and how many blocks it holds from there on.

    `holders` gives the bits of who holds a block of the chain.
    """
    length, holding = 0, holders(0) if num_blocks else 0
    while holding:
        length = _first_without(holding, holders, length + 1, num_blocks)
        still = holders(length) & holding if length < num_blocks else 0
        for bit in _bits(holding ^ still):
            yield bit, length
        holding = still


def _first_without(all_: int, holders: Callable[[int], int], low: int, high: int) -> int:
    """By bisection the first block from `low` on that not all of these hold; else `high`."""
    while low < high:
        middle = (low + high) // 2
        if holders(middle) & all_ == all_:
            low = middle + 1
        else:
            high = middle
    return low


def _set(masks: dict[int, int], bit: int, names: Sequence[int]) -> None:
    """Set one bit in the masks of these names."""
    before = list(map(masks.setdefault, names, repeat(bit)))
    if before.count(bit) < len(before):
        others = zip(names, before, strict=True)
        masks.update((name, mask | bit) for name, mask in others if mask != bit)


def _clear(masks: dict[int, int], bits: int, names: Sequence[int]) -> None:
    """Clear bits in the masks of these names, and drop those that nobody holds any more."""
    before = list(map(masks.pop, names, repeat(0)))
    if before.count(bits) < len(before):
        rest = ((name, mask & ~bits) for name, mask in zip(names, before, strict=True))
        masks.update((name, mask) for name, mask in rest if mask)


def _bits(mask: int) -> Iterator[int]:
    """Each bit that is set, alone."""
    while mask:
        bit = mask & -mask
        yield bit
        mask ^= bit
