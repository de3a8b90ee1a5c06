"""One stream from a decode worker that brings the chunks of all its attempts for this process."""

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Protocol

import grpc

from tidemill.api.decode.v1 import decode_service_pb2 as pb

if TYPE_CHECKING:  # the name exists in the stubs alone
    from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceAsyncStub

_ID_BYTES = 16
_AGAIN_S = 0.5

logger = logging.getLogger(__name__)


class ChunkSink(Protocol):
    """An attempt as its channel sees it; neither method raises."""

    def arrived(self, chunk: pb.Chunk) -> None:
        """A chunk of it."""
        ...

    def no_more(self, *, broken: bool) -> None:
        """The channel is over: by itself, or `broken`, and then chunks may be lost."""
        ...


class ChunkChannel:
    """Opened again whenever it is over; each time it has another id."""

    def __init__(self, decode: "DecodeServiceAsyncStub", address: str) -> None:
        self._decode = decode
        self._address = address
        self._id: bytes | None = None
        self._number = 0
        self._sinks: dict[int, ChunkSink] = {}

    @property
    def is_open(self) -> bool:
        """Whether Starts may name it."""
        return self._id is not None

    def attach(self, sink: ChunkSink) -> pb.ChunkRoute | None:
        """What Start is to say so that the chunks come to `sink`; None while it is not open."""
        if self._id is None:
            return None
        self._number += 1
        self._sinks[self._number] = sink
        return pb.ChunkRoute(channel_id=self._id, number=self._number)

    def detach(self, route: pb.ChunkRoute) -> None:
        """What still comes of this attempt is dropped."""
        self._sinks.pop(route.number, None)

    async def run(self) -> None:
        """Until cancelled, or if the worker has no such method."""
        while True:
            try:
                await self._follow()
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    return
                logger.debug(
                    "no chunk channel", extra={"address": self._address, "error": error.details()}
                )
            await asyncio.sleep(_AGAIN_S)

    async def _follow(self) -> None:
        channel_id = secrets.token_bytes(_ID_BYTES)
        broken = True
        try:
            async for message in self._decode.WatchChunks(
                pb.WatchChunksRequest(channel_id=channel_id)
            ):
                self._id = channel_id
                for routed in message.chunks:
                    sink = self._sinks.get(routed.number)
                    if sink is not None:
                        sink.arrived(routed.chunk)
            broken = False
        finally:
            self._id = None
            sinks, self._sinks = self._sinks, {}
            for sink in sinks.values():
                sink.no_more(broken=broken)
