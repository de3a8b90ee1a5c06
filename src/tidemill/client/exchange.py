"""One request as its client sees it: what has come, what may be tried again. No I/O."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tidemill.api.router.v1.router_service_pb2 import GenerateResponse
from tidemill.client import convert
from tidemill.client.request import Prepared
from tidemill.client.retry import Attempts
from tidemill.client.types import (
    Accepted,
    Choice,
    ChoiceEnd,
    Completed,
    Completion,
    Event,
    FinishReason,
    PromptScored,
    TextChunk,
    TokenLogprobs,
    Usage,
)
from tidemill.errors import Internal, TidemillError


@dataclass(slots=True)
class _Growing:
    """What has come of one choice."""

    index: int
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, chunk: TextChunk) -> None:
        self.text.append(chunk.text)
        self.reasoning.append(chunk.reasoning)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)

    def choice(self) -> Choice:
        return Choice(
            index=self.index,
            text="".join(self.text),
            reasoning="".join(self.reasoning),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            logprobs=tuple(self.logprobs),
        )


class Exchange:
    """Both stacks drive one of these: `receive` for each message, `end` when no more comes,
    `attempts` when one fails before its first message.
    """

    def __init__(
        self, prepared: Prepared, attempts: Attempts, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.message = prepared.message
        self.accepted: Accepted | None = None
        self.completed: Completed | None = None
        self.usage = Usage()
        self.ttft_s: float | None = None
        self.attempts = attempts
        self._clock = clock
        self._sent_at = clock()
        self._next_sequence = 0
        self._choices = [_Growing(index) for index in range(self.message.sampling.n or 1)]
        self._prompt_logprobs: list[TokenLogprobs] = []

    @property
    def request_id(self) -> str:
        """The idempotency key that every attempt carries."""
        return self.message.request_id

    @property
    def text(self) -> str:
        """Answer text so far, of the first choice."""
        return "".join(self._choices[0].text)

    @property
    def reasoning(self) -> str:
        """Reasoning text so far, of the first choice."""
        return "".join(self._choices[0].reasoning)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Completion tokens so far, of the first choice."""
        return tuple(self._choices[0].token_ids)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All choices as far as they have come."""
        return tuple(growing.choice() for growing in self._choices)

    def receive(self, message: GenerateResponse) -> Event | None:
        """Take in one message; None if its kind is newer than this client.

        Internal `SEQUENCE_GAP` where chunks or tokens were lost on the way.
        """
        event = convert.event(message)
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, TextChunk):
            self._take_chunk(event)
        elif isinstance(event, PromptScored):
            self._prompt_logprobs.extend(event.logprobs)
        elif isinstance(event, ChoiceEnd):
            self._growing(event.choice).finish_reason = event.finish_reason
        elif isinstance(event, Completed):
            self._complete(event)
        return event

    def end(self) -> None:
        """Take in the stream's end. Internal `STREAM_TRUNCATED` if the bill has not come."""
        if self.completed is None:
            raise self.identified(
                Internal("the stream ended without its last message", reason="STREAM_TRUNCATED")
            )

    def identified(self, error: TidemillError) -> TidemillError:
        """`error`, with this request's id unless the server named one."""
        error.request_id = error.request_id or self.request_id
        return error

    def completion(self) -> Completion:
        """The whole answer, once it is complete."""
        self.end()
        assert self.completed is not None
        return Completion(
            request_id=self.request_id,
            choices=self.choices,
            prompt_logprobs=tuple(self._prompt_logprobs),
            finish_reason=self.completed.finish_reason,
            usage=self.completed.usage,
            receipt=self.completed.receipt,
            seed=self.completed.seed,
            timing=self.completed.timing,
            replayed=self.accepted is None,
        )

    def _take_chunk(self, chunk: TextChunk) -> None:
        growing = self._growing(chunk.choice)
        due = len(growing.token_ids)
        if chunk.sequence != self._next_sequence or chunk.first_index != due:
            raise self._gap(
                f"chunk {chunk.sequence} at token {chunk.first_index} came where chunk "
                f"{self._next_sequence} at token {due} was due"
            )
        self._next_sequence += 1
        if self.ttft_s is None and chunk.token_ids:
            self.ttft_s = self._clock() - self._sent_at
        growing.take(chunk)
        self.usage = chunk.usage

    def _growing(self, choice: int) -> _Growing:
        if choice >= len(self._choices):
            raise self._gap(f"choice {choice} came where {len(self._choices)} were asked for")
        return self._choices[choice]

    def _complete(self, completed: Completed) -> None:
        self.completed = completed
        self.usage = completed.usage
        for growing in self._choices:
            growing.finish_reason = growing.finish_reason or completed.finish_reason

    def _gap(self, problem: str) -> TidemillError:
        return self.identified(Internal(problem, reason="SEQUENCE_GAP"))
