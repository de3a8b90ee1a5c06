"""A circuit breaker: after a failure, do not ask again for a while."""

import time
from collections.abc import Callable


class Breaker:
    """Closed until a failure; then open for a pause that doubles from `first_s` to `most_s`.

    When a pause is over, one caller is let through as the probe while the rest stay refused; its
    success closes the breaker, its failure opens it for twice as long.
    """

    def __init__(
        self, first_s: float, most_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._clock = clock
        self._pause_s = 0.0
        self._open_until = 0.0
        self._probing = False

    @property
    def closed(self) -> bool:
        """Whether the last call that was let through succeeded."""
        return self._pause_s == 0.0

    def admits(self) -> bool:
        """Whether to make a call now; makes this caller the probe when a pause has just ended."""
        if self.closed:
            return True
        now = self._clock()
        if now < self._open_until:
            return False
        self._open_until = now + self._pause_s
        self._probing = True
        return True

    def retry_after_s(self) -> float:
        """Seconds until the next probe may go."""
        return 0.0 if self.closed else max(self._open_until - self._clock(), 0.0)

    def succeeded(self) -> None:
        """A call that was let through got an answer."""
        self._pause_s = 0.0
        self._probing = False

    def failed(self) -> None:
        """A call that was let through got none. Calls that failed together count once."""
        if self.closed or self._probing:
            self._pause_s = min(max(2 * self._pause_s, self._first_s), self._most_s)
            self._open_until = self._clock() + self._pause_s
            self._probing = False
