"""What a router knows of its workers: their last report, and its own work not yet in one."""

from dataclasses import dataclass
from typing import NamedTuple


class TierOverlap(NamedTuple):
    """Leading blocks of a prompt that a worker holds in any tier, by where each of them lies."""

    device: int
    host: int = 0

    @property
    def blocks(self) -> int:
        """In all tiers."""
        return self.device + self.host


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerLoad:
    """A worker's last report.

    `observed_at` is when it arrived, in seconds of the router's monotonic clock.
    `queued_uncached_tokens` are prompt tokens admitted and not yet computed, reused ones
    excluded; their attention work is `queued_attention_pairs`. Both paces are moving averages, 0
    where unknown: uncached prompt tokens computed in a second of prefilling, microseconds of a
    step of the decode batch. Blocks are those of the device tier; evictable ones count as free.
    """

    worker_id: str
    epoch: int
    sequence: int
    observed_at: float
    queued_uncached_tokens: int = 0
    queued_attention_pairs: int = 0
    prefill_tokens_per_s: int = 0
    decode_step_us: int = 0
    prefilling: int = 0
    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """Work on its way to a worker: requests, uncached prompt tokens, KV blocks."""

    requests: int = 0
    tokens: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class _Dispatch:
    at: float
    tokens: int
    blocks: int


class InFlight:
    """What this router has dispatched, so that a burst does not chase one stale report.

    A report counts as including what was dispatched `settle_s` seconds before it arrived.
    """

    def __init__(self, *, settle_s: float = 0.1) -> None:
        self._settle_s = settle_s
        self._by_worker: dict[str, dict[str, _Dispatch]] = {}
        self._workers_of: dict[str, list[str]] = {}

    def add(
        self, request_id: str, worker_id: str, *, at: float, tokens: int = 0, blocks: int = 0
    ) -> None:
        """Note a dispatch, in the order of `at`; a request may be at several workers."""
        dispatches = self._by_worker.setdefault(worker_id, {})
        if dispatches.pop(request_id, None) is None:
            self._workers_of.setdefault(request_id, []).append(worker_id)
        dispatches[request_id] = _Dispatch(at, tokens, blocks)

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended or was refused, at all its workers."""
        for worker_id in self._workers_of.pop(request_id, ()):
            dispatches = self._by_worker[worker_id]
            del dispatches[request_id]
            if not dispatches:
                del self._by_worker[worker_id]

    def forget(self, worker_id: str) -> None:
        """Forget a worker that is gone or restarted."""
        for request_id in self._by_worker.pop(worker_id, {}):
            workers = self._workers_of[request_id]
            workers.remove(worker_id)
            if not workers:
                del self._workers_of[request_id]

    def unreported(self, load: WorkerLoad) -> Work:
        """The work that `load` does not show yet."""
        requests = tokens = blocks = 0
        included_until = load.observed_at - self._settle_s
        for dispatch in reversed(self._by_worker.get(load.worker_id, {}).values()):
            if dispatch.at <= included_until:
                break
            requests += 1
            tokens += dispatch.tokens
            blocks += dispatch.blocks
        return Work(requests, tokens, blocks)

    def __len__(self) -> int:
        return len(self._workers_of)
