"""Which KV blocks come to a worker's pool and leave it, as numbered messages for its watchers."""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.blocks import block_names
from tidemill.engine import BlockPool, PoolTier

TIERS = {PoolTier.DEVICE: pb.KV_TIER_DEVICE, PoolTier.HOST: pb.KV_TIER_HOST}

_Event = tuple[PoolTier, bool, bytes]  # tier, whether the block came, its hash


class KvEvents:
    """The pool's changes since the worker started: a bounded log, and all that is held beyond it.

    Messages of one epoch are numbered for all watchers alike, so one that comes back may resume
    where it was. Who is behind the log, or was told only a part of what is held, is told all again.
    The pool reports from any thread; the rest belongs to the event loop.

    The log keeps about `log_blocks` changes; no more than as many wait to be read, and when nobody
    reads they are forgotten. A message has at most `part_blocks`.
    """

    def __init__(
        self, pool: BlockPool, *, epoch: int, log_blocks: int = 65_536, part_blocks: int = 4096
    ) -> None:
        self._pool = pool
        self._epoch = epoch
        self._log_blocks = log_blocks
        self._part_blocks = part_blocks
        self._lock = threading.Lock()
        self._events: list[_Event] = []
        self._missed = False
        # Each sequence with its message; a part of all that is held has none, but for the last.
        self._log: deque[tuple[int, pb.WatchKvResponse | None]] = deque()
        self._num_logged = 0
        self._sequence = 0
        pool.listen(self._on_change)

    def after(self, epoch: int | None, sequence: int) -> Iterable[pb.WatchKvResponse]:
        """What one who has seen `sequence` of `epoch` is to be told, perhaps nothing.

        Messages are shared: not to be changed.
        """
        self._take_in()
        resumed = self._since(sequence) if epoch == self._epoch else None
        return self._all() if resumed is None else resumed

    def _on_change(self, tier: PoolTier, block_hash: bytes, came: bool) -> None:
        with self._lock:
            if len(self._events) >= self._log_blocks:
                self._events.clear()
                self._missed = True
            self._events.append((tier, came, block_hash))

    def _take_in(self) -> None:
        """Turn what the pool has reported into messages."""
        with self._lock:
            events, self._events = self._events, []
            missed, self._missed = self._missed, False
        if missed:  # whoever has seen what came before is behind the log now
            self._log.clear()
            self._num_logged = 0
        for start in range(0, len(events), self._part_blocks):
            part = events[start : start + self._part_blocks]
            self._append(self._message(self._sequence + 1, _changes(part)))

    def _append(self, message: pb.WatchKvResponse | None) -> None:
        self._sequence += 1
        self._log.append((self._sequence, message))
        self._num_logged += _size(message)
        while self._num_logged > self._log_blocks and len(self._log) > 1:
            self._num_logged -= _size(self._log.popleft()[1])

    def _since(self, sequence: int) -> list[pb.WatchKvResponse] | None:
        """Messages after a sequence; None unless the log still tells what follows it."""
        if not self._log or not self._log[0][0] <= sequence <= self._sequence:
            return None
        num_missing = self._sequence - sequence
        if self._log[-num_missing - 1][1] is None:
            return None
        later = itertools.islice(reversed(self._log), num_missing)
        missing = [
            self._message(number, []) if message is None else message for number, message in later
        ]
        return missing[::-1]

    def _all(self) -> Iterator[pb.WatchKvResponse]:
        """All that is held, in parts that take the next numbers.

        What the pool changes meanwhile is reported after it; to hear of it twice does no harm.
        """
        held = [
            (tier, True, each) for tier, found in self._pool.findable().items() for each in found
        ]
        first = self._sequence + 1
        parts = range(0, max(len(held), 1), self._part_blocks)
        for _ in parts[1:]:
            self._append(None)
        self._append(self._message(first + len(parts) - 1, []))
        for number, start in enumerate(parts, start=first):
            part = held[start : start + self._part_blocks]
            yield self._message(number, _changes(part), resets=number == first)

    def _message(
        self, sequence: int, changes: list[pb.KvChange], *, resets: bool = False
    ) -> pb.WatchKvResponse:
        return pb.WatchKvResponse(
            epoch=self._epoch, sequence=sequence, resets=resets, changes=changes
        )


def _changes(events: Sequence[_Event]) -> list[pb.KvChange]:
    """Neighbours of one kind together. Tiers know nothing of each other, so each has its turn."""
    changes = []
    for tier, number in TIERS.items():
        of_tier = [event for event in events if event[0] is tier]
        for came, group in itertools.groupby(of_tier, key=lambda event: event[1]):
            names = block_names([block_hash for *_, block_hash in group])
            changes.append(pb.KvChange(tier=number, removed=not came, blocks=names))
    return changes


def _size(message: pb.WatchKvResponse | None) -> int:
    """What a message counts in the log: its blocks, and something if it has none."""
    return 1 + sum(len(change.blocks) for change in message.changes) if message is not None else 1
