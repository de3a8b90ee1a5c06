"""A time limit for another's answer, in which our own absence does not count."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_LATE_S = 0.1
_MOST_TIMERS = 3


class Alarm:
    """Calls `over` after `limit_s` seconds, or later where this process stood still meanwhile.

    What came in that time lies in the socket, and a loop may run its timers before it reads:
    uvloop always does. So a timer that is late itself begins anew, twice at most.
    """

    def __init__(self, limit_s: float, over: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._num_timers = 0
        self._begin()

    def cancel(self) -> None:
        """The answer came."""
        self._timer.cancel()

    def _begin(self) -> None:
        self._num_timers += 1
        due = self._loop.time() + self._limit_s
        self._timer = self._loop.call_at(due, self._ring, due)

    def _ring(self, due: float) -> None:
        if self._loop.time() - due > _LATE_S and self._num_timers < _MOST_TIMERS:
            self._begin()
        else:
            self._over()


@asynccontextmanager
async def patience(limit_s: float) -> AsyncIterator[None]:
    """TimeoutError once an `Alarm` of `limit_s` seconds rings."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        alarm = Alarm(limit_s, lambda: limit.reschedule(loop.time()))
        try:
            yield
        finally:
            alarm.cancel()
