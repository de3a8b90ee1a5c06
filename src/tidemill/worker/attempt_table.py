"""Which attempts a decode worker runs, and the Finals that nobody has acknowledged yet."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from tidemill.api.common.v1.lifecycle_pb2 import AttemptId
from tidemill.api.decode.v1.decode_service_pb2 import Final
from tidemill.errors import AlreadyExists, FailedPrecondition, NotFound
from tidemill.worker.task import AttemptKey, attempt_key


class Supersedable(Protocol):
    """An attempt as this table sees it."""

    def supersede(self) -> None:
        """Another router has taken the request over: end."""
        ...


@dataclass
class _Request:
    """What is known of one request id. `seen_at` keeps its fence for as long as a Final."""

    fence: int
    seen_at: float
    running: dict[AttemptKey, Supersedable] = field(default_factory=dict)
    finals: dict[AttemptKey, tuple[Final, float]] = field(default_factory=dict)


class AttemptTable:
    """Attempts by request id; a Final is kept until acknowledged, at least `retention_s`."""

    def __init__(self, *, retention_s: float, clock: Callable[[], float]) -> None:
        self._retention_s = retention_s
        self._clock = clock
        self._requests: dict[str, _Request] = {}
        self.num_running = 0

    @property
    def num_finals(self) -> int:
        """Finals kept for somebody."""
        # The copy lets the metrics thread read while the event loop adds and removes.
        return sum(len(request.finals) for request in list(self._requests.values()))

    def check(self, attempt: AttemptId) -> None:
        """Raise what `begin` would raise."""
        request = self._requests.get(attempt.request_id)
        if request is None:
            return
        if attempt.fence < request.fence:
            raise FailedPrecondition(
                f"fence {attempt.fence} is older than {request.fence}", reason="STALE_FENCE"
            )
        key = attempt_key(attempt)
        if key in request.running or key in request.finals:
            raise AlreadyExists("this attempt was begun before", reason="ATTEMPT_EXISTS")

    def begin(self, attempt: AttemptId, runner: Supersedable) -> None:
        """Note a running attempt and end those with an older fence.

        Raises FailedPrecondition (STALE_FENCE), and AlreadyExists (ATTEMPT_EXISTS) for an attempt
        that runs or whose Final is kept.
        """
        self.check(attempt)
        now = self._clock()
        request = self._requests.setdefault(attempt.request_id, _Request(attempt.fence, now))
        for key, older in list(request.running.items()):
            if key[1] < attempt.fence:
                older.supersede()
        request.fence, request.seen_at = attempt.fence, now
        request.running[attempt_key(attempt)] = runner
        self.num_running += 1

    def refuse(self, attempt: AttemptId) -> None:
        """It never began: forget it, so that it may be tried again."""
        self._end(attempt)

    def finish(self, attempt: AttemptId, final: Final) -> None:
        """It ended; keep its Final."""
        request = self._end(attempt)
        request.finals[attempt_key(attempt)] = (final, self._clock())

    def final(self, attempt: AttemptId) -> Final:
        """The kept Final.

        Raises FailedPrecondition (ATTEMPT_RUNNING) while there is none yet, NotFound when the
        attempt is unknown, acknowledged or forgotten.
        """
        request = self._requests.get(attempt.request_id)
        key = attempt_key(attempt)
        if request is not None and key in request.running:
            raise FailedPrecondition("the attempt still runs", reason="ATTEMPT_RUNNING")
        if request is None or key not in request.finals:
            raise NotFound("no Final is kept for this attempt", reason="FINAL_NOT_FOUND")
        return request.finals[key][0]

    def finals(self, request_id: str) -> list[Final]:
        """The kept Finals of a request, by fence and attempt."""
        request = self._requests.get(request_id)
        kept = [final for final, _ in request.finals.values()] if request else []
        return sorted(kept, key=lambda final: (final.id.fence, final.id.attempt))

    def is_running(self, request_id: str) -> bool:
        """Whether an attempt of the request runs."""
        request = self._requests.get(request_id)
        return request is not None and bool(request.running)

    def acknowledge(self, attempt: AttemptId) -> bool:
        """Forget a Final; returns whether it was kept."""
        request = self._requests.get(attempt.request_id)
        return request is not None and request.finals.pop(attempt_key(attempt), None) is not None

    def sweep(self) -> int:
        """Forget what is older than the retention; returns how many Finals nobody acknowledged."""
        oldest = self._clock() - self._retention_s
        forgotten = 0
        for request_id, request in list(self._requests.items()):
            late = [key for key, (_, ended_at) in request.finals.items() if ended_at < oldest]
            forgotten += len(late)
            for key in late:
                del request.finals[key]
            if not request.running and not request.finals and request.seen_at < oldest:
                del self._requests[request_id]
        return forgotten

    def _end(self, attempt: AttemptId) -> _Request:
        request = self._requests[attempt.request_id]
        del request.running[attempt_key(attempt)]
        request.seen_at = self._clock()
        self.num_running -= 1
        return request
