"""When a failed attempt may be made again, and after how long."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tidemill.errors import (
    Cancelled,
    RequestInProgress,
    ResourceExhausted,
    TidemillError,
    Unavailable,
)

_NEXT_ROUTER_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Exponential back-off with jitter; a server's RetryInfo goes before it.

    `max_retries` counts attempts after the first; 0 turns retrying off. `on_wait`, if given, is
    called before each wait with the error and the seconds that will pass; it must not block.
    """

    max_retries: int = 2
    initial_s: float = 0.5
    cap_s: float = 8.0
    on_wait: Callable[[TidemillError, float], None] | None = None

    def delay_s(self, error: TidemillError, *, retries: int, rng: Random) -> float | None:
        """Seconds to wait before the next attempt; None: do not try again.

        Asked only while the request cannot have been accepted on this attempt. UNAVAILABLE is
        tried again, RESOURCE_EXHAUSTED when the server says after how long (a limit without that
        does not pass by waiting). A retry that finds its predecessor still being served waits
        for it as long as the deadline allows.
        """
        if isinstance(error, RequestInProgress) and retries > 0:
            return self._backoff(error, retries, rng)
        if retries >= self.max_retries:
            return None
        if isinstance(error, Unavailable):
            return self._backoff(error, retries, rng)
        if isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
            return self._backoff(error, retries, rng)
        return None

    def _backoff(self, error: TidemillError, retries: int, rng: Random) -> float:
        if error.retry_after_s is not None:
            return error.retry_after_s * rng.uniform(1.0, 1.25)
        return min(self.cap_s, self.initial_s * 2.0 ** min(retries, 32)) * rng.uniform(0.75, 1.0)


class Attempts:
    """The attempts of one call, all within `timeout_s` seconds of now."""

    def __init__(
        self,
        policy: RetryPolicy,
        rng: Random,
        *,
        timeout_s: float,
        repeatable: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._rng = rng
        self._clock = clock
        self._deadline = clock() + timeout_s
        self._repeatable = repeatable
        self._retries = 0

    def remaining_s(self) -> float:
        """Seconds that the present attempt may take."""
        return max(0.001, self._deadline - self._clock())

    def delay_s(self, error: TidemillError) -> float:
        """Seconds until the next attempt. Raises `error` when there is to be none."""
        if isinstance(error, Cancelled):
            # Not by us, who still wait for the answer: a gRPC server that shuts down says so to
            # calls that it has not begun (grpc/grpc#41785).
            error = Unavailable(
                "the router is going away",
                request_id=error.request_id,
                retry_after_s=_NEXT_ROUTER_S,
            )
        delay = self._policy.delay_s(error, retries=self._retries, rng=self._rng)
        if not self._repeatable or delay is None or delay >= self._deadline - self._clock():
            raise error
        self._retries += 1
        if self._policy.on_wait is not None:
            self._policy.on_wait(error, delay)
        return delay
