"""What a router knows of its workers: their last report, and its own work not yet in one."""

import math
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import NamedTuple

_MOST_ROUTERS = 16.0
_MOST_DRIFT = 1e-3  # between two machines' clocks
_DOUBT = 2  # requests by which the estimate of the other routers' share leans to "there are none"


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

    `observed_at` is when it was made, in seconds of the router's monotonic clock, as far as that
    can be told. `queued_uncached_tokens` are prompt tokens admitted and not yet computed, reused
    ones excluded; their attention work is `queued_attention_pairs`. Both paces are moving averages,
    0 where unknown: uncached prompt tokens computed in a second of prefilling, microseconds of a
    step of the decode batch. `waiting` are requests that wait for their KV, from elsewhere or from
    host memory. Blocks are those of the device tier; evictable ones count as free.
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

    @property
    def decoding(self) -> int:
        """Requests that decode there, or will once they have their KV."""
        return self.running + self.waiting


@dataclass(frozen=True, slots=True)
class Work:
    """Work for a worker: requests, uncached prompt tokens, their attention pairs, KV blocks."""

    requests: float = 0
    tokens: float = 0
    pairs: float = 0
    blocks: float = 0

    @classmethod
    def sum(cls, works: Iterable["Work"]) -> "Work":
        """All of it together."""
        requests = tokens = pairs = blocks = 0.0
        for work in works:
            requests += work.requests
            tokens += work.tokens
            pairs += work.pairs
            blocks += work.blocks
        return cls(requests, tokens, pairs, blocks)

    def faded(self, factor: float) -> "Work":
        """So much of it."""
        return Work(
            self.requests * factor, self.tokens * factor, self.pairs * factor, self.blocks * factor
        )


class Dispatch(NamedTuple):
    """Work that was sent at an instant of the router's clock."""

    at: float
    work: Work


class InFlight:
    """What this router has dispatched, so that a burst does not chase one stale report.

    A report counts as including what was dispatched `settle_s` seconds before it was made. What
    was given to a worker fades with `half_life_s`, however fast it was worked off.
    """

    def __init__(self, *, settle_s: float = 0.1, half_life_s: float = 30.0) -> None:
        self._settle_s = settle_s
        self._half_life_s = half_life_s
        self._by_worker: dict[str, dict[str, Dispatch]] = {}
        self._workers_of: dict[str, list[str]] = {}
        self._given: dict[str, Dispatch] = {}

    def add(
        self,
        request_id: str,
        worker_id: str,
        *,
        at: float,
        tokens: int = 0,
        pairs: int = 0,
        blocks: int = 0,
    ) -> None:
        """Note a dispatch, in the order of `at`; a request may be at several workers."""
        dispatches = self._by_worker.setdefault(worker_id, {})
        if dispatches.pop(request_id, None) is None:
            self._workers_of.setdefault(request_id, []).append(worker_id)
        work = Work(1, tokens, pairs, blocks)
        dispatches[request_id] = Dispatch(at, work)
        given = Work.sum([self.given(worker_id, now=at), work])
        self._given[worker_id] = Dispatch(at, given)

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended or was refused, at all its workers."""
        for worker_id in self._workers_of.pop(request_id, ()):
            dispatches = self._by_worker[worker_id]
            del dispatches[request_id]
            if not dispatches:
                del self._by_worker[worker_id]

    def forget(self, worker_id: str) -> None:
        """Forget a worker that is gone or restarted."""
        self._given.pop(worker_id, None)
        for request_id in self._by_worker.pop(worker_id, {}):
            workers = self._workers_of[request_id]
            workers.remove(worker_id)
            if not workers:
                del self._workers_of[request_id]

    def unreported(self, load: WorkerLoad) -> list[Dispatch]:
        """What `load` does not show yet, the oldest first."""
        unreported = []
        included_until = load.observed_at - self._settle_s
        for dispatch in reversed(self._by_worker.get(load.worker_id, {}).values()):
            if dispatch.at <= included_until:
                break
            unreported.append(dispatch)
        unreported.reverse()
        return unreported

    def given(self, worker_id: str, *, now: float) -> Work:
        """What the worker was given lately."""
        if (given := self._given.get(worker_id)) is None:
            return Work()
        return given.work.faded(0.5 ** ((now - given.at) / self._half_life_s))

    def idle_s(self, worker_id: str, *, now: float) -> float:
        """Seconds since the worker was last given something; 0 while any of it goes on."""
        if worker_id in self._by_worker:
            return 0.0
        given = self._given.get(worker_id)
        return math.inf if given is None else now - given.at

    def num_routers(
        self, loads: Sequence[WorkerLoad], unreported: Sequence[Sized], num_reported: int
    ) -> float:
        """How many routers like this one the fleet seems to have; 1.0 if there are no others.

        Told by how many of the requests that `loads` report, beside `unreported`, are its own.
        """
        own = sum(len(self._by_worker.get(load.worker_id, ())) for load in loads)
        own -= sum(map(len, unreported))
        return min(max((num_reported + _DOUBT) / (own + _DOUBT), 1.0), _MOST_ROUTERS)

    def __len__(self) -> int:
        return len(self._workers_of)


class OutputLengths:
    """How many tokens answers have lately: averages that forget, one `half_life` of answers long.

    Until there are answers, as if there had been one of `prior` tokens.
    """

    def __init__(self, *, prior: int = 256, half_life: int = 256) -> None:
        self._kept = 0.5 ** (1 / half_life)
        self._weight, self._tokens, self._squares = 1.0, float(prior), float(prior) ** 2

    def add(self, num_tokens: int) -> None:
        """An answer has ended."""
        self._weight = self._kept * self._weight + 1
        self._tokens = self._kept * self._tokens + num_tokens
        self._squares = self._kept * self._squares + num_tokens**2

    def expected(self, max_tokens: int) -> int:
        """Of an answer that has not begun."""
        return min(max_tokens, round(self._tokens / self._weight))

    @property
    def remaining(self) -> float:
        """Of an answer that is under way, met at any time: half the mean, weighted by length."""
        return self._squares / self._tokens / 2 if self._tokens else 0.0


class ReportClock:
    """When a worker's reports were made, on the router's clock, by the worker's own clock in them.

    A report that is later than the quickest of late has waited somewhere; what all reports take
    cannot be told. Of a worker without a clock, all are taken to come at once.
    """

    def __init__(self) -> None:
        self._offset_s = math.inf
        self._heard_at = 0.0

    def made_at(self, uptime_s: float, *, now: float) -> float:
        """Of a report that came `now`, made `uptime_s` into the worker's life (0: unknown)."""
        if not uptime_s:
            return now
        drifted = self._offset_s + _MOST_DRIFT * (now - self._heard_at)
        self._offset_s = min(drifted, now - uptime_s)
        self._heard_at = now
        return self._offset_s + uptime_s
