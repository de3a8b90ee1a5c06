"""A time limit for another's answer, in which our own absence does not count."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_LATE_S = 0.1
_MOST_TIMERS = 3


@asynccontextmanager
async def patience(limit_s: float) -> AsyncIterator[None]:
    """TimeoutError after `limit_s` seconds, or later where this process stood still meanwhile.

    What came in that time lies in the socket, and a loop may run its timers before it reads:
    uvloop always does. So a timer that is late itself begins anew, twice at most.
    """
    loop = asyncio.get_running_loop()
    num_timers = 0
    timer: asyncio.TimerHandle

    def begin() -> None:
        nonlocal num_timers, timer
        num_timers += 1
        due = loop.time() + limit_s
        timer = loop.call_at(due, over, due)

    def over(due: float) -> None:
        now = loop.time()
        if now - due > _LATE_S and num_timers < _MOST_TIMERS:
            begin()
        else:
            limit.reschedule(now)

    async with asyncio.timeout(None) as limit:
        begin()
        try:
            yield
        finally:
            timer.cancel()
