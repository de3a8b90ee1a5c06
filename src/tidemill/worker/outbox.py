"""What an attempt has to tell its router, in order, with waiting tokens put together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tidemill.api.common.v1.lifecycle_pb2 import FinishReason, PrefillDone
from tidemill.api.decode.v1.decode_service_pb2 import ChoiceEnded, Chunk, DecodeResponse, Final
from tidemill.engine import TokenLogprobs
from tidemill.errors import TidemillError
from tidemill.worker.chunk_channel import MAX_MESSAGE_TOKENS, ChunkChannel
from tidemill.worker.task import logprobs_messages


@dataclass
class _Waiting:
    """One choice's tokens that the router has not been told of."""

    num_generated: int = 1
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ended: ChoiceEnded | None = None


class Outbox:
    """PrefillDone, Chunks, Final, then perhaps an error; one reader, never blocks the writer.

    Tokens that are written while the reader is busy, or within `pace_s()` seconds of the last
    Chunk, leave in one Chunk a choice. Every message costs the process that also runs the engine.
    With a `channel` chunks leave through that, with `number`, and all else does not wait for them.
    """

    def __init__(
        self,
        attempt: int,
        *,
        pace_s: Callable[[], float],
        channel: ChunkChannel | None = None,
        number: int = 0,
    ) -> None:
        self._attempt = attempt
        self._pace_s = pace_s
        self._channel = channel
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._prefill_done: PrefillDone | None = None
        self._choices: list[_Waiting] = []
        self._num_sent = 0
        self._final: Final | None = None
        self._error: TidemillError | None = None
        self._closed = False
        self._changed = asyncio.Event()

    @property
    def num_generated(self) -> int:
        """Tokens of all choices, the first ones included."""
        return sum(choice.num_generated for choice in self._choices)

    def num_generated_by(self, choice: int) -> int:
        """Tokens of one choice; 0 before the prompt is prefilled."""
        return self._choices[choice].num_generated if self._choices else 0

    def prefill_done(self, done: PrefillDone) -> None:
        """The prompt is prefilled, and with it token 0 of every choice is there."""
        self._prefill_done = done
        self._choices = [_Waiting() for _ in range(max(len(done.first_token_ids), 1))]
        self._num_sent = len(self._choices)
        self._wake()

    def tokens(
        self,
        first_index: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        choice: int = 0,
    ) -> None:
        """A choice's tokens from `first_index` on; those known already are skipped."""
        waiting = self._choices[choice]
        num_known = waiting.num_generated - first_index
        waiting.token_ids += token_ids[num_known:]
        waiting.logprobs += logprobs[num_known:]
        waiting.num_generated += len(token_ids[num_known:])
        if self._timer is None:
            delay = self._next_at - self._loop.time()
            if delay <= 0:
                self._let_go()
            else:
                self._timer = self._loop.call_later(delay, self._let_go)

    def choice_ended(self, choice: int, reason: "FinishReason.ValueType") -> None:
        """One of several choices has ended; its tokens go first."""
        waiting = self._choices[choice]
        waiting.ended = ChoiceEnded(
            choice=choice, reason=reason, generated_tokens=waiting.num_generated
        )
        self._wake()

    def close(self, final: Final | None, error: TidemillError | None) -> None:
        """The last word: at most one Final, then `error` if there is one."""
        self._final, self._error, self._closed = final, error, True
        self._wake()
        if self._channel is not None:
            self._channel.detach(self._number)

    async def responses(self) -> AsyncIterator[DecodeResponse]:
        """Everything in order; ends after Final. Raises the error given to `close`."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            closed = self._closed
            if self._prefill_done is not None:
                done, self._prefill_done = self._prefill_done, None
                yield DecodeResponse(prefill_done=done)
            for response in self._take():
                yield response
            if closed:
                break
        for response in self._take():
            yield response
        if self._final is not None:
            yield DecodeResponse(final=self._final)
        if self._error is not None:
            raise self._error

    @property
    def has_tokens(self) -> bool:
        """Whether tokens wait."""
        return any(choice.token_ids for choice in self._choices)

    def take_chunks(self, most_tokens: int) -> Iterator[Chunk]:
        """For the channel: up to so many of the tokens that wait, choice by choice."""
        for index, waiting in enumerate(self._choices):
            if waiting.token_ids and most_tokens > 0:
                self._next_at = self._loop.time() + self._pace_s()
                chunk = self._chunk(index, waiting, most_tokens)
                most_tokens -= len(chunk.token_ids)
                yield chunk

    def _take(self) -> Iterator[DecodeResponse]:
        """What waits now, choice by choice; what comes meanwhile keeps the pace."""
        for index, waiting in enumerate(self._choices):
            left = len(waiting.token_ids) if self._channel is None else 0
            while left > 0:
                self._next_at = self._loop.time() + self._pace_s()
                yield DecodeResponse(chunk=self._chunk(index, waiting, MAX_MESSAGE_TOKENS))
                left -= MAX_MESSAGE_TOKENS
            if waiting.ended is not None and (self._channel is not None or not waiting.token_ids):
                ended, waiting.ended = waiting.ended, None
                yield DecodeResponse(choice_ended=ended)

    def _wake(self) -> None:
        self._changed.set()
        if self._channel is None or self.has_tokens:
            self._let_go()

    def _let_go(self) -> None:
        """Tokens wait no longer for others."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._channel is None:
            self._changed.set()
        else:
            self._channel.ready(self._number, self)

    def _chunk(self, choice: int, waiting: _Waiting, most_tokens: int) -> Chunk:
        first_index = waiting.num_generated - len(waiting.token_ids)
        token_ids = waiting.token_ids[:most_tokens]
        logprobs = waiting.logprobs[:most_tokens]
        del waiting.token_ids[:most_tokens], waiting.logprobs[:most_tokens]
        self._num_sent += len(token_ids)
        return Chunk(
            attempt=self._attempt,
            first_index=first_index,
            token_ids=token_ids,
            generated_tokens=self._num_sent,
            choice=choice,
            logprobs=logprobs_messages(logprobs),
        )
