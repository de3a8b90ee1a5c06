"""Blocks on their way in: one StoreBlocks stream, from its pieces to whole, checked payloads."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.errors import DeadlineExceeded, InvalidRequest
from tidemill.kv.cache_client import digest
from tidemill.kv.pieces import Assembly
from tidemill.rpc.validation import validate

STALL_S = 10.0


class Staging:
    """How many bytes of unfinished blocks all streams together may hold."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.num_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Reserve room for a block; False if there is none now."""
        if self.num_bytes + num_bytes > self._limit_bytes:
            return False
        self.num_bytes += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Free what `take` reserved."""
        self.num_bytes -= num_bytes


@dataclass(frozen=True)
class Arrival:
    """One block of a stream. `payload` is None where it was not wanted or found no room."""

    block_hash: bytes
    payload: bytes | None
    payload_sha256: bytes


async def namespace_of(requests: AsyncIterator[pb.StoreBlocksRequest]) -> pb.BlockNamespace:
    """The stream's first message. Raises InvalidRequest if it is anything but a namespace."""
    first = await _next(requests)
    if first is None:
        raise _bad("namespace", "must come first")
    validate(first)
    if not first.HasField("namespace"):
        raise _bad("namespace", "must come first")
    return first.namespace


async def arrivals(
    requests: AsyncIterator[pb.StoreBlocksRequest],
    staging: Staging,
    *,
    wanted: Callable[[BlockPiece], bool],
    max_block_bytes: int,
) -> AsyncGenerator[Arrival, None]:
    """The stream's blocks in order, each with its checksum verified.

    Raises InvalidRequest for a piece out of order, a wrong checksum, and a stream that ends in
    the middle of a block; DeadlineExceeded when nothing comes for STALL_S.
    """
    while (request := await _next(requests)) is not None:
        first = _piece(request)
        reserved = first.total_bytes if wanted(first) and staging.take(first.total_bytes) else 0
        try:
            block = Assembly(first, max_bytes=max_block_bytes, keep=reserved > 0)
            while not block.complete:
                request = await _next(requests)
                if request is None:
                    raise _bad("piece", "the stream ended in the middle of a block")
                block.add(_piece(request))
            payload = block.payload() if reserved else None
            if payload is not None and await digest(payload) != block.payload_sha256:
                raise _bad("piece.payload_sha256", "differs from that of the payload")
            yield Arrival(block.block_hash, payload, block.payload_sha256)
        finally:
            staging.give_back(reserved)


async def _next(requests: AsyncIterator[pb.StoreBlocksRequest]) -> pb.StoreBlocksRequest | None:
    try:
        async with asyncio.timeout(STALL_S):
            return await anext(requests, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no message came for {STALL_S:g} s") from None


def _piece(request: pb.StoreBlocksRequest) -> BlockPiece:
    if request.WhichOneof("content") != "piece":
        raise _bad("namespace", "must come once")
    return request.piece


def _bad(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{field} {problem}", violations=[(field, problem)])
