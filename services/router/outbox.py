"""What a client still has to be told, merged where it reads slowly and never dropped."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from services.router.finish import Completed, PrefillSite
from tidemill.billing import Usage
from tidemill.errors import TidemillError


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request has a place."""

    position: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Its place has changed."""

    position: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Part of a completion: tokens from `first_index` on, text as far as it is certain."""

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    reasoning: str
    usage: Usage
    site: PrefillSite

    def followed_by(self, later: "Piece") -> "Piece":
        """Both as one."""
        return Piece(
            first_index=self.first_index,
            token_ids=self.token_ids + later.token_ids,
            text=self.text + later.text,
            reasoning=self.reasoning + later.reasoning,
            usage=later.usage,
            site=later.site,
        )


Event = Accepted | Moved | Piece | Completed


class Outbox:
    """Filled by one generation, emptied by one reader.

    A reader that finds more than one piece waiting is behind: it gets them merged, up to
    `max_tokens` a message, and waits at most `max_delay_s` for a message to fill.
    """

    def __init__(self, *, max_tokens: int, max_delay_s: float, clock: Callable[[], float]) -> None:
        self._max_tokens = max_tokens
        self._max_delay_s = max_delay_s
        self._clock = clock
        self._accepted: Accepted | None = None
        self._moved: Moved | None = None
        self._pieces: deque[tuple[float, Piece]] = deque()
        self._end: Completed | TidemillError | None = None
        self._filled = asyncio.Event()

    def accept(self, position: int) -> None:
        """Say that the request has a place."""
        self._accepted = Accepted(position)
        self._filled.set()

    def move(self, position: int) -> None:
        """Say that the place has changed; an older place not yet read is forgotten."""
        self._moved = Moved(position)
        self._filled.set()

    def put(self, piece: Piece) -> None:
        """Add a piece of the completion."""
        self._moved = None
        self._pieces.append((self._clock(), piece))
        self._filled.set()

    def close(self, end: Completed | TidemillError) -> None:
        """Say how it ended; an error is raised to the reader."""
        self._end = end
        self._filled.set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Everything in order, then the end."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            if self._accepted is not None:
                accepted, self._accepted = self._accepted, None
                yield accepted
            if self._moved is not None:
                moved, self._moved = self._moved, None
                yield moved
            while self._pieces:
                if len(self._pieces) > 1:
                    await self._fill_message()
                yield self._take()
            if self._end is not None and not self._pieces:
                if isinstance(self._end, TidemillError):
                    raise self._end
                yield self._end
                return

    def _take(self) -> Piece:
        piece = self._pieces.popleft()[1]
        while self._pieces:
            following = self._pieces[0][1]
            if len(piece.token_ids) + len(following.token_ids) > self._max_tokens:
                break
            piece = piece.followed_by(self._pieces.popleft()[1])
        return piece

    async def _fill_message(self) -> None:
        until = self._pieces[0][0] + self._max_delay_s
        while self._end is None and (left := until - self._clock()) > 0:
            if sum(len(piece.token_ids) for _, piece in self._pieces) >= self._max_tokens:
                return
            self._filled.clear()
            try:
                async with asyncio.timeout(left):
                    await self._filled.wait()
            except TimeoutError:
                return
            finally:
                self._filled.set()
