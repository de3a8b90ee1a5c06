"""Which request ids are running in this process; how others ended is the ledger's to say."""

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tidemill.errors import AlreadyExists, RequestInProgress

if TYPE_CHECKING:
    from services.router.generation import Generation

_RETRY_IN_PROGRESS_S = 1.0


@dataclass(eq=False, slots=True)
class _Running:
    body_sha256: bytes
    generation: "Generation | None" = None


@dataclass
class RequestBook:
    """One entry for each request that runs; keys are `admission.request_key`'s."""

    _running: dict[str, _Running] = field(default_factory=dict)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._idle.set()

    def __len__(self) -> int:
        """Requests that run."""
        return len(self._running)

    def begin(self, key: str, body_sha256: bytes) -> None:
        """Enter a request as running.

        AlreadyExists if one with another body has this id, RequestInProgress while it runs.
        """
        running = self._running.get(key)
        if running is not None and running.body_sha256 != body_sha256:
            raise AlreadyExists("this request id was used for another request")
        if running is not None:
            raise RequestInProgress("this request is running", retry_after_s=_RETRY_IN_PROGRESS_S)
        self._running[key] = _Running(body_sha256)
        self._idle.clear()

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

    def end(self, key: str) -> None:
        """The request runs no more."""
        del self._running[key]
        if not self._running:
            self._idle.set()
