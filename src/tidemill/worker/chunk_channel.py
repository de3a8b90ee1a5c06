"""Chunks of many attempts in one stream to the router that asked for them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from tidemill.api.decode.v1.decode_service_pb2 import (
    Chunk,
    Start,
    WatchChunksResponse,
)
from tidemill.errors import AlreadyExists, InvalidRequest, Overloaded

MOST_CHANNELS = 64  # a router process has one
# With 20 alternatives a token takes up to 160 bytes: a fifth of what one message may hold.
MAX_MESSAGE_TOKENS = 8192
PACE_S = 0.002
_RETRY_S = 1.0


class ChunkSource(Protocol):
    """An attempt as a channel sees it."""

    def take_chunks(self, most_tokens: int) -> Iterator[Chunk]:
        """What waits, up to so many tokens; it waits no more."""
        ...

    @property
    def has_tokens(self) -> bool:
        """Whether anything waits."""
        ...


class ChunkChannel:
    """One stream, and the attempts whose chunks it carries.

    While a message is on its way, what comes gathers at its source: so a reader that is quick gets
    the tokens of each step in one message, and one that is slow gets fewer and longer chunks.
    """

    def __init__(self) -> None:
        self._attached: dict[int, Callable[[], None]] = {}
        self._ready: dict[int, ChunkSource] = {}
        self._changed = asyncio.Event()
        self._draining = self._broken = False

    def attach(self, number: int, on_broken: Callable[[], None]) -> None:
        """Chunks with that number may come; `on_broken` is called if they cannot leave any more."""
        self._attached[number] = on_broken

    def detach(self, number: int) -> None:
        """Nothing more comes with that number; what waits still leaves."""
        self._attached.pop(number, None)
        self._changed.set()

    def is_attached(self, number: int) -> bool:
        """Whether the number is in use."""
        return number in self._attached

    def ready(self, number: int, source: ChunkSource) -> None:
        """The source has tokens; they leave with the next message."""
        if not self._broken:
            self._ready[number] = source
            self._changed.set()

    def drain(self) -> None:
        """End once nothing is attached."""
        self._draining = True
        self._changed.set()

    def break_off(self) -> None:
        """The stream is over, and with it every attempt that still needs it."""
        self._broken = True
        self._ready.clear()
        for on_broken in list(self._attached.values()):
            on_broken()

    async def messages(self) -> AsyncIterator[WatchChunksResponse]:
        """An empty one first, then all that comes; what comes within `PACE_S` leaves together."""
        yield WatchChunksResponse()
        loop, next_at = asyncio.get_running_loop(), 0.0
        while not (self._draining and not self._attached and not self._ready):
            await self._changed.wait()
            if (delay := next_at - loop.time()) > 0:
                await asyncio.sleep(delay)
            self._changed.clear()
            next_at = loop.time() + PACE_S
            while self._ready:
                message = self._message()
                if message.chunks:
                    yield message

    def _message(self) -> WatchChunksResponse:
        message = WatchChunksResponse()
        left = MAX_MESSAGE_TOKENS
        while self._ready and left > 0:
            number, source = next(iter(self._ready.items()))
            del self._ready[number]
            for chunk in source.take_chunks(left):
                left -= len(chunk.token_ids)
                message.chunks.add(number=number, chunk=chunk)
            if source.has_tokens:
                self._ready[number] = source  # behind the others
        return message


class ChunkChannels:
    """The open channels of one worker, by the id that its router gave each."""

    def __init__(self) -> None:
        self._open: dict[bytes, ChunkChannel] = {}
        self._draining = False

    @contextmanager
    def open(self, channel_id: bytes) -> Iterator[ChunkChannel]:
        """A channel for as long as its call lasts.

        Raises AlreadyExists (CHANNEL_EXISTS) for an id in use, and Overloaded where there are too
        many.
        """
        if channel_id in self._open:
            raise AlreadyExists("this channel is open", reason="CHANNEL_EXISTS")
        if len(self._open) >= MOST_CHANNELS:
            raise Overloaded(f"{MOST_CHANNELS} channels are open", retry_after_s=_RETRY_S)
        channel = self._open[channel_id] = ChunkChannel()
        if self._draining:
            channel.drain()
        try:
            yield channel
        finally:
            del self._open[channel_id]
            channel.break_off()

    def route(self, start: Start) -> ChunkChannel | None:
        """Where the attempt's chunks go; None: into its own call.

        Raises InvalidRequest for a number that another attempt has in that channel.
        """
        if not start.HasField("route"):
            return None
        channel = self._open.get(start.route.channel_id)
        if channel is not None and channel.is_attached(start.route.number):
            problem = "is another attempt's"
            raise InvalidRequest(f"route.number {problem}", violations=[("route.number", problem)])
        return channel

    def drain(self) -> None:
        """No attempts come any more: each channel ends with its last."""
        self._draining = True
        for channel in self._open.values():
            channel.drain()
