"""How long something took, less the time in which this process stood still."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_TICK_S = 0.01
_MOST_S = 0.1  # a tick that took longer was not ours


class Stopwatch:
    """`seconds` so far; a machine that stops for a while adds next to nothing."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def run(self) -> None:
        """Count until cancelled."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            self.seconds += min(now - last, _MOST_S)
            last = now


@asynccontextmanager
async def stopwatch() -> AsyncIterator[Stopwatch]:
    """One that runs meanwhile."""
    watch = Stopwatch()
    running = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
