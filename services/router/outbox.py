"""What a client still has to be told, merged where it reads slowly and never dropped."""

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from services.router.finish import Completed, Finish
from services.router.tally import Told
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
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


@dataclass(slots=True)
class Piece:
    """Part of one choice: tokens from `first_index` on, text as far as it is certain.

    `told` are the counts up to the last of its tokens. `logprobs` are the tokens', or empty. In the
    outbox: `since` when it has waited, and whether it is of several that were `merged`.
    """

    choice: int
    first_index: int
    token_ids: list[int]
    text: str
    reasoning: str
    told: Told
    logprobs: list[TokenLogprobs]
    since: float = field(default=0.0, compare=False)
    merged: bool = field(default=False, compare=False)

    def add(self, later: "Piece") -> None:
        """Let it be both; they are of one choice."""
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.text += later.text
        self.reasoning += later.reasoning
        self.told = later.told
        self.merged = True


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """One of several choices has ended, with so many billed tokens."""

    choice: int
    finish: Finish
    completion_tokens: int


Event = Accepted | Moved | PromptScored | Piece | ChoiceEnd | Completed


@dataclass(slots=True)
class _Lane:
    """What waits of one choice: its pieces, then its end."""

    pieces: deque[Piece] = field(default_factory=deque)
    end: ChoiceEnd | None = None
    ended_at: float = 0.0

    @property
    def since(self) -> float:
        """Since when the oldest has waited; never, if nothing waits."""
        if self.pieces:
            return self.pieces[0].since
        return math.inf if self.end is None else self.ended_at

    @property
    def is_behind(self) -> bool:
        """Whether more than one piece has come; a choice's first token never waits for others."""
        return bool(self.pieces) and (
            len(self.pieces) > 1 or (self.pieces[0].merged and self.pieces[0].first_index > 0)
        )

    def take(self) -> Piece | ChoiceEnd:
        """The next event."""
        if self.pieces:
            return self.pieces.popleft()
        assert self.end is not None
        end, self.end = self.end, None
        return end


class Outbox:
    """Filled by one generation, emptied by one reader.

    A reader that comes back to more than one piece of a choice is behind: it gets them merged, up
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
        self._told: Told | None = None
        self._end: Completed | TidemillError | None = None
        self._reader: asyncio.Future[None] | None = None  # which waits

    def accept(self, position: int, expected_wait_s: float | None = None) -> None:
        """Say that the request has a place."""
        self._accepted = Accepted(position, expected_wait_s)
        self._wake()

    def move(self, position: int, expected_wait_s: float | None = None) -> None:
        """Say that the place has changed; an older place not yet read is forgotten."""
        self._moved = Moved(position, expected_wait_s)
        self._wake()

    def score(self, scored: PromptScored) -> None:
        """Tell of the prompt's tokens; before any piece."""
        self._moved = None
        self._scored.append(scored)
        self._wake()

    def put(self, piece: Piece) -> None:
        """Add a piece of a choice."""
        self._moved = None
        pieces = self._lane(piece.choice).pieces
        if pieces:
            last = pieces[-1]
            num_tokens = len(last.token_ids) + len(piece.token_ids)
            if num_tokens <= self._max_tokens:
                last.add(piece)
                if num_tokens == self._max_tokens:
                    self._wake()
                return
        piece.since = self._clock()
        pieces.append(piece)
        self._wake()

    def end_choice(self, end: ChoiceEnd) -> None:
        """Say that a choice has ended; no piece of it follows."""
        lane = self._lane(end.choice)
        lane.end, lane.ended_at = end, self._clock()
        self._wake()

    def close(self, end: Completed | TidemillError) -> None:
        """Say how it ended; an error is raised to the reader."""
        self._end = end
        self._wake()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Everything in order, then the end."""
        idle = False
        while True:
            if self._accepted is not None:
                accepted, self._accepted = self._accepted, None
                yield accepted
            if self._moved is not None:
                moved, self._moved = self._moved, None
                yield moved
            while self._scored:
                yield self._scored.popleft()
            while (lane := self._longest_waiting()) is not None:
                if not idle and lane.is_behind:
                    await self._fill_message(lane)
                idle = False
                yield self._up_to_date(lane.take())
            if self._end is not None:
                if isinstance(self._end, TidemillError):
                    raise self._end
                yield self._end
                return
            if self._is_empty:
                await self._wait()
                idle = True

    @property
    def _is_empty(self) -> bool:
        """Whether nothing came while the reader was away, but for pieces, which it looked for."""
        return self._accepted is None and self._moved is None and not self._scored

    def _lane(self, choice: int) -> _Lane:
        lane = self._lanes.get(choice)
        if lane is None:
            lane = self._lanes[choice] = _Lane()
        return lane

    def _longest_waiting(self) -> _Lane | None:
        longest, since = None, math.inf
        for lane in self._lanes.values():
            if (waiting := lane.since) < since:
                longest, since = lane, waiting
        return longest

    def _up_to_date(self, event: Piece | ChoiceEnd) -> Event:
        """Merged pieces overtake those of other choices; the usage that is told never falls."""
        if isinstance(event, Piece):
            told = self._told
            if told is not None and event.told.generated_tokens < told.generated_tokens:
                event.told = told
            else:
                self._told = event.told
        return event

    async def _fill_message(self, lane: _Lane) -> None:
        first = lane.pieces[0]
        until = first.since + self._max_delay_s
        while self._end is None and (left := until - self._clock()) > 0:
            full = len(first.token_ids) >= self._max_tokens or len(lane.pieces) > 1
            if full or lane.end is not None:
                return
            timer = asyncio.get_running_loop().call_later(left, self._wake)
            try:
                await self._wait()
            finally:
                timer.cancel()

    async def _wait(self) -> None:
        """Until something may have come."""
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
