"""Which request ids are running, and how those ended that are remembered."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.router.finish import Completed
from tidemill.errors import AlreadyExists, RequestInProgress

if TYPE_CHECKING:
    from services.router.generation import Generation

_RETRY_IN_PROGRESS_S = 1.0


@dataclass(eq=False, slots=True)
class _Running:
    body_sha256: bytes
    generation: "Generation | None" = None


@dataclass(frozen=True, slots=True)
class _Ended:
    body_sha256: bytes
    completed: Completed
    forget_at: float


@dataclass
class RequestBook:
    """One entry for each request id of each tenant; keys are `admission.request_key`'s.

    A completed request is remembered for `retained_s` seconds, at most `max_retained` of them, in
    this process alone.
    """

    max_retained: int
    retained_s: float
    clock: Callable[[], float]
    _running: dict[str, _Running] = field(default_factory=dict)
    _ended: OrderedDict[str, _Ended] = field(default_factory=OrderedDict)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def __len__(self) -> int:
        """Requests that run."""
        return len(self._running)

    def begin(self, key: str, body_sha256: bytes) -> Completed | None:
        """Enter a request as running, or return how it ended if it has already.

        AlreadyExists if the id was used with another body, RequestInProgress while it runs.
        """
        self._forget_old()
        running, ended = self._running.get(key), self._ended.get(key)
        for known in (running, ended):
            if known is not None and known.body_sha256 != body_sha256:
                raise AlreadyExists("this request id was used for another request")
        if running is not None:
            raise RequestInProgress("this request is running", retry_after_s=_RETRY_IN_PROGRESS_S)
        if ended is not None:
            return ended.completed
        self._running[key] = _Running(body_sha256)
        self._idle.clear()
        return None

    def attach(self, key: str, generation: "Generation") -> None:
        """Say what serves the running request."""
        self._running[key].generation = generation

    def find(self, key: str) -> "Generation | None":
        """What serves the request, if it is running."""
        running = self._running.get(key)
        return running.generation if running else None

    def running(self) -> "list[Generation]":
        """All that are being served."""
        return [each.generation for each in self._running.values() if each.generation]

    async def idle_within(self, patience_s: float) -> bool:
        """Wait until nothing runs; whether it came to that."""
        try:
            async with asyncio.timeout(patience_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def end(self, key: str, completed: Completed | None) -> None:
        """The request runs no more; None: nothing to remember, the id may be used again."""
        running = self._running.pop(key)
        if not self._running:
            self._idle.set()
        if completed is not None:
            forget_at = self.clock() + self.retained_s
            self._ended[key] = _Ended(running.body_sha256, completed, forget_at)

    def _forget_old(self) -> None:
        now = self.clock()
        while self._ended:
            oldest = next(iter(self._ended.values()))
            if len(self._ended) <= self.max_retained and oldest.forget_at > now:
                return
            self._ended.popitem(last=False)
