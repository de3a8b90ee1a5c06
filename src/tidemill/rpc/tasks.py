"""Ending background tasks for certain."""

import asyncio
from typing import Any

_AGAIN_S = 1.0


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait until all have ended; what they raise stays with them.

    One cancellation may be lost: on Python 3.11 `asyncio.wait_for`, through which redis-py sends,
    swallows one that arrives as the awaited future completes, and a loop would go on for ever.
    """
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
