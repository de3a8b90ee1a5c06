"""What an attempt has to tell its router, in order, with waiting tokens put together."""

import asyncio
from collections.abc import AsyncIterator, Callable

from tidemill.api.common.v1.lifecycle_pb2 import PrefillDone
from tidemill.api.decode.v1.decode_service_pb2 import Chunk, DecodeResponse, Final
from tidemill.errors import TidemillError


class Outbox:
    """PrefillDone, Chunks, Final, then perhaps an error; one reader, never blocks the writer.

    Tokens that are written while the reader is busy, or within `pace_s()` seconds of the last
    Chunk, leave in one Chunk. Every message costs the process that also runs the engine.
    """

    def __init__(self, attempt: int, *, pace_s: Callable[[], float]) -> None:
        self.num_generated = 0
        self._attempt = attempt
        self._pace_s = pace_s
        self._loop = asyncio.get_running_loop()
        self._next_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._prefill_done: PrefillDone | None = None
        self._tokens: list[int] = []
        self._final: Final | None = None
        self._error: TidemillError | None = None
        self._closed = False
        self._changed = asyncio.Event()

    def prefill_done(self, done: PrefillDone) -> None:
        """The prompt is prefilled, and with it token 0 is there."""
        self._prefill_done = done
        self.num_generated = 1
        self._wake()

    def tokens(self, first_index: int, token_ids: list[int]) -> None:
        """Tokens from `first_index` on; those known already are skipped."""
        new = token_ids[self.num_generated - first_index :]
        self._tokens += new
        self.num_generated += len(new)
        if self._timer is None:
            delay = self._next_at - self._loop.time()
            if delay <= 0:
                self._changed.set()
            else:
                self._timer = self._loop.call_later(delay, self._wake)

    def close(self, final: Final | None, error: TidemillError | None) -> None:
        """The last word: at most one Final, then `error` if there is one."""
        self._final, self._error, self._closed = final, error, True
        self._wake()

    async def responses(self) -> AsyncIterator[DecodeResponse]:
        """Everything in order; ends after Final. Raises the error given to `close`."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            closed = self._closed
            if self._prefill_done is not None:
                done, self._prefill_done = self._prefill_done, None
                yield DecodeResponse(prefill_done=done)
            if self._tokens:
                self._next_at = self._loop.time() + self._pace_s()
                yield DecodeResponse(chunk=self._chunk())
            if closed:
                break
        if self._tokens:
            yield DecodeResponse(chunk=self._chunk())
        if self._final is not None:
            yield DecodeResponse(final=self._final)
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._changed.set()

    def _chunk(self) -> Chunk:
        token_ids, self._tokens = self._tokens, []
        return Chunk(
            attempt=self._attempt,
            first_index=self.num_generated - len(token_ids),
            token_ids=token_ids,
            generated_tokens=self.num_generated,
        )
