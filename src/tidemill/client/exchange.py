"""One request as its client sees it: what has come, what may be tried again. No I/O."""

import time
from collections.abc import Callable

from tidemill.api.router.v1.router_service_pb2 import GenerateResponse
from tidemill.client import convert
from tidemill.client.request import Prepared
from tidemill.client.retry import Attempts
from tidemill.client.types import Accepted, Completed, Completion, Event, TextChunk, Usage
from tidemill.errors import Internal, TidemillError


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
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._token_ids: list[int] = []

    @property
    def request_id(self) -> str:
        """The idempotency key that every attempt carries."""
        return self.message.request_id

    @property
    def text(self) -> str:
        """Answer text so far."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """Reasoning text so far."""
        return "".join(self._reasoning)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Completion tokens so far."""
        return tuple(self._token_ids)

    def receive(self, message: GenerateResponse) -> Event | None:
        """Take in one message; None if its kind is newer than this client.

        Internal `SEQUENCE_GAP` where chunks or tokens were lost on the way.
        """
        event = convert.event(message)
        if isinstance(event, Accepted):
            self.accepted = event
        elif isinstance(event, TextChunk):
            self._take_chunk(event)
        elif isinstance(event, Completed):
            self.completed = event
            self.usage = event.usage
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
            text=self.text,
            reasoning=self.reasoning,
            token_ids=self.token_ids,
            finish_reason=self.completed.finish_reason,
            usage=self.completed.usage,
            receipt=self.completed.receipt,
            seed=self.completed.seed,
            timing=self.completed.timing,
            replayed=self.accepted is None,
        )

    def _take_chunk(self, chunk: TextChunk) -> None:
        if chunk.sequence != self._next_sequence or chunk.first_index != len(self._token_ids):
            raise self.identified(
                Internal(
                    f"chunk {chunk.sequence} at token {chunk.first_index} came where chunk "
                    f"{self._next_sequence} at token {len(self._token_ids)} was due",
                    reason="SEQUENCE_GAP",
                )
            )
        self._next_sequence += 1
        if self.ttft_s is None and chunk.token_ids:
            self.ttft_s = self._clock() - self._sent_at
        self._text.append(chunk.text)
        self._reasoning.append(chunk.reasoning)
        self._token_ids.extend(chunk.token_ids)
        self.usage = chunk.usage
