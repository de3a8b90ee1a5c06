"""Tasks that outlive the call that started them: settlements, relays, ledger commands."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from tidemill.errors import TidemillError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class OwnedTasks:
    """Holds every task until it ends and logs those that end by a surprise."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, T], *, name: str) -> asyncio.Task[T]:
        """Run `coroutine` whoever started it goes away."""
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def join(self, timeout_s: float) -> None:
        """Wait until all have ended, then cancel those that are left."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, TidemillError):
            logger.error("task %s failed", task.get_name(), exc_info=error)
