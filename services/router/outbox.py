"""What a client still has to be told, merged where it reads slowly and never dropped."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace

from services.router.finish import Completed, Finish, PrefillSite
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.billing import Usage
from tidemill.errors import TidemillError


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request has a place; None: when it will be served is not known yet."""

    position: int
    expected_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """Its place has changed, or what is expected of it."""

    position: int
    expected_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class PromptScored:
    """How likely the prompt's tokens from `first_index` on were."""

    first_index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Part of one choice: tokens from `first_index` on, text as far as it is certain.

    `logprobs` are the tokens', or empty.
    """

    first_index: int
    token_ids: tuple[int, ...]
    text: str
    reasoning: str
    usage: Usage
    site: PrefillSite
    choice: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()

    def followed_by(self, later: "Piece") -> "Piece":
        """Both as one; they are of one choice."""
        return Piece(
            choice=self.choice,
            first_index=self.first_index,
            token_ids=self.token_ids + later.token_ids,
            logprobs=self.logprobs + later.logprobs,
            text=self.text + later.text,
            reasoning=self.reasoning + later.reasoning,
            usage=later.usage,
            site=later.site,
        )


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """One of several choices has ended, with so many billed tokens."""

    choice: int
    finish: Finish
    completion_tokens: int


Event = Accepted | Moved | PromptScored | Piece | ChoiceEnd | Completed


@dataclass(slots=True)
class _Lane:
    """What waits of one choice, with the instants when it came."""

    pieces: deque[tuple[float, Piece]] = field(default_factory=deque)
    end: tuple[float, ChoiceEnd] | None = None

    @property
    def since(self) -> float | None:
        """Since when the oldest has waited; None if nothing waits."""
        if self.pieces:
            return self.pieces[0][0]
        return self.end[0] if self.end else None

    @property
    def num_tokens(self) -> int:
        return sum(len(piece.token_ids) for _, piece in self.pieces)

    def take(self, max_tokens: int) -> Piece | ChoiceEnd:
        """The next event: pieces together up to `max_tokens`, then the end."""
        if not self.pieces:
            assert self.end is not None
            (_, end), self.end = self.end, None
            return end
        piece = self.pieces.popleft()[1]
        while self.pieces:
            if len(piece.token_ids) + len(self.pieces[0][1].token_ids) > max_tokens:
                break
            piece = piece.followed_by(self.pieces.popleft()[1])
        return piece


class Outbox:
    """Filled by one generation, emptied by one reader.

    A reader that finds more than one piece of a choice waiting is behind: it gets them merged, up
    to `max_tokens` a message, and waits at most `max_delay_s` for a message to fill. Choices are
    never merged; the one that has waited longest comes first.
    """

    def __init__(self, *, max_tokens: int, max_delay_s: float, clock: Callable[[], float]) -> None:
        self._max_tokens = max_tokens
        self._max_delay_s = max_delay_s
        self._clock = clock
        self._accepted: Accepted | None = None
        self._moved: Moved | None = None
        self._scored: deque[PromptScored] = deque()
        self._lanes: dict[int, _Lane] = {}
        self._told = Usage()
        self._end: Completed | TidemillError | None = None
        self._filled = asyncio.Event()

    def accept(self, position: int, expected_wait_s: float | None = None) -> None:
        """Say that the request has a place."""
        self._accepted = Accepted(position, expected_wait_s)
        self._filled.set()

    def move(self, position: int, expected_wait_s: float | None = None) -> None:
        """Say that the place has changed; an older place not yet read is forgotten."""
        self._moved = Moved(position, expected_wait_s)
        self._filled.set()

    def score(self, scored: PromptScored) -> None:
        """Tell of the prompt's tokens; before any piece."""
        self._moved = None
        self._scored.append(scored)
        self._filled.set()

    def put(self, piece: Piece) -> None:
        """Add a piece of a choice."""
        self._moved = None
        self._lane(piece.choice).pieces.append((self._clock(), piece))
        self._filled.set()

    def end_choice(self, end: ChoiceEnd) -> None:
        """Say that a choice has ended; no piece of it follows."""
        self._lane(end.choice).end = self._clock(), end
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
            while self._scored:
                yield self._scored.popleft()
            while (lane := self._longest_waiting()) is not None:
                if len(lane.pieces) > 1:
                    await self._fill_message(lane)
                yield self._up_to_date(lane.take(self._max_tokens))
            if self._end is not None and self._longest_waiting() is None:
                if isinstance(self._end, TidemillError):
                    raise self._end
                yield self._end
                return

    def _lane(self, choice: int) -> _Lane:
        return self._lanes.setdefault(choice, _Lane())

    def _longest_waiting(self) -> _Lane | None:
        waiting = [
            (since, lane) for lane in self._lanes.values() if (since := lane.since) is not None
        ]
        return min(waiting, key=lambda each: each[0])[1] if waiting else None

    def _up_to_date(self, event: Piece | ChoiceEnd) -> Event:
        """Merged pieces overtake those of other choices; the usage that is told never falls."""
        if isinstance(event, ChoiceEnd):
            return event
        if event.usage.generated_tokens < self._told.generated_tokens:
            return replace(event, usage=self._told)
        self._told = event.usage
        return event

    async def _fill_message(self, lane: _Lane) -> None:
        until = lane.pieces[0][0] + self._max_delay_s
        while self._end is None and (left := until - self._clock()) > 0:
            if lane.end is not None or lane.num_tokens >= self._max_tokens:
                return
            self._filled.clear()
            try:
                async with asyncio.timeout(left):
                    await self._filled.wait()
            except TimeoutError:
                return
            finally:
                self._filled.set()
