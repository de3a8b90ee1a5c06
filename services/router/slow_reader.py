"""Telling a reader that is slow from one that has stopped."""

import asyncio
from types import TracebackType
from typing import Self


class StallGuard:
    """Cuts its block off by TimeoutError when one write in it has lasted `patience_s` seconds.

    Its timer is set anew only when it rings: a write costs two looks at the clock.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._writing_since: float | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._patience_s, self._look)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, traceback)

    def writes(self) -> None:
        """A write begins."""
        self._writing_since = self._loop.time()

    def written(self) -> None:
        """It has ended."""
        self._writing_since = None

    def _look(self) -> None:
        now, since = self._loop.time(), self._writing_since
        until = (now if since is None else since) + self._patience_s
        if until <= now:
            self._timeout.reschedule(now)
        else:
            self._timer = self._loop.call_at(until, self._look)
