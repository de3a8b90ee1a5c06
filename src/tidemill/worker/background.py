"""Loops that run beside a worker's services for as long as it lives."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType

from tidemill.rpc import tasks

logger = logging.getLogger(__name__)


class Background:
    """Tasks that end with the block. One that fails is logged and named by `failure`."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Background":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await tasks.end(*self._tasks)

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run `run()`, a loop that is not to end by itself."""
        self._tasks.append(asyncio.create_task(self._guard(name, run), name=name))

    async def _guard(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        try:
            await run()
        except Exception as error:  # whatever it was, health must tell
            logger.exception("background task failed", extra={"task": name})
            self.failure = f"{name} failed: {error!r}"
