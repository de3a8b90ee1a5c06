"""What an attempt has to tell its router, in order, with waiting tokens put together."""

import asyncio
from collections.abc import AsyncIterator

from tidemill.api.common.v1.lifecycle_pb2 import PrefillDone
from tidemill.api.decode.v1.decode_service_pb2 import Chunk, DecodeResponse, Final
from tidemill.errors import TidemillError


class Outbox:
    """PrefillDone, Chunks, Final, then perhaps an error; one reader, never blocks the writer.

    Tokens that are written while the reader is busy leave in one Chunk.
    """

    def __init__(self, attempt: int) -> None:
        self.num_generated = 0
        self._attempt = attempt
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
        self._changed.set()

    def tokens(self, token_ids: list[int]) -> None:
        """More tokens, from index `num_generated` on."""
        self._tokens += token_ids
        self.num_generated += len(token_ids)
        self._changed.set()

    def close(self, final: Final | None, error: TidemillError | None) -> None:
        """The last word: at most one Final, then `error` if there is one."""
        self._final, self._error, self._closed = final, error, True
        self._changed.set()

    async def responses(self) -> AsyncIterator[DecodeResponse]:
        """Everything in order; ends after Final. Raises the error given to `close`."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            closed = self._closed
            if self._prefill_done is not None:
                done, self._prefill_done = self._prefill_done, None
                yield DecodeResponse(prefill_done=done)
            while self._tokens:
                yield DecodeResponse(chunk=self._chunk())
            if closed:
                break
        if self._final is not None:
            yield DecodeResponse(final=self._final)
        if self._error is not None:
            raise self._error

    def _chunk(self) -> Chunk:
        token_ids, self._tokens = self._tokens, []
        return Chunk(
            attempt=self._attempt,
            first_index=self.num_generated - len(token_ids),
            token_ids=token_ids,
            generated_tokens=self.num_generated,
        )
