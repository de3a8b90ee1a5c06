"""Messages that carry latents, written in protobuf's wire format with their bytes copied once.

protobuf copies a bytes field when it is set and again, into a buffer that grows, when the message
is serialized; for messages of megabytes that costs more than the network. Here the bytes go from
where they lie into the finished message. Reading is protobuf's.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NewType, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from tidemill.api.cache.v1 import cache_service_pb2 as cache
from tidemill.api.common.v1.kv_pb2 import BlockPiece, KvSegment
from tidemill.api.prefill.v1.prefill_service_pb2 import PullKvResponse
from tidemill.kv.pieces import PIECE_BYTES

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

    FetchRequest = cache.FetchBlocksRequest
    StoreCall = grpc.aio.StreamUnaryMultiCallable[
        cache.StoreBlocksRequest | "Wire", cache.StoreBlocksResponse
    ]

_CACHE_SERVICE = cache.DESCRIPTOR.services_by_name["CacheService"].full_name
_VARINT, _FIXED64, _LENGTH = 0, 1, 2

Chunk = bytes | memoryview


Wire = NewType("Wire", bytes)  # a message already in wire format


def serialize(message: Message | Wire) -> bytes:
    """For handlers and stubs whose messages may be ready already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def override(
    server: grpc.aio.Server, service: str, method: str, handler: "grpc.RpcMethodHandler[Any, Any]"
) -> None:
    """Serve a method by `handler` instead of the one that generated code has added."""
    server.add_registered_method_handlers(service, {method: handler})


def serve_fetches(
    server: grpc.aio.Server, fetch_blocks: "Callable[[FetchRequest, Any], AsyncIterator[Wire]]"
) -> None:
    """Serve CacheService.FetchBlocks by a method whose messages are ready."""
    handler = grpc.unary_stream_rpc_method_handler(
        fetch_blocks,
        request_deserializer=cache.FetchBlocksRequest.FromString,
        response_serializer=serialize,
    )
    override(server, _CACHE_SERVICE, "FetchBlocks", handler)


def store_call(channel: grpc.aio.Channel) -> "StoreCall":
    """CacheService.StoreBlocks for messages that may be ready already."""
    call: Any = channel.stream_unary(
        f"/{_CACHE_SERVICE}/StoreBlocks",
        request_serializer=serialize,
        response_deserializer=cache.StoreBlocksResponse.FromString,
    )
    return cast("StoreCall", call)


class SegmentsWriter:
    """A PullKvResponse, segment by segment."""

    def __init__(self) -> None:
        self._chunks: list[Chunk] = []

    def add(
        self, *, layer: int, first_token: int, num_tokens: int, xxh3: int, data: list[memoryview]
    ) -> None:
        """One segment; its data are the chunks put together."""
        num_bytes = sum(len(each) for each in data)
        head = b"".join(
            (
                _uint(_SEGMENT["layer"], layer),
                _uint(_SEGMENT["first_token"], first_token),
                _uint(_SEGMENT["num_tokens"], num_tokens),
                _length(_SEGMENT["data"], num_bytes),
            )
        )
        tail = _fixed64(_SEGMENT["xxh3"], xxh3)
        self._chunks.append(_length(_PULL["segments"], len(head) + num_bytes + len(tail)) + head)
        self._chunks += data
        self._chunks.append(tail)

    def finish(self) -> Wire:
        """The message."""
        return Wire(b"".join(self._chunks))


def fetch_responses(
    block_hash: bytes, payload: bytes, payload_sha256: bytes, tier: int
) -> Iterator[Wire]:
    """The FetchBlocksResponses of one block."""
    for piece in _pieces(_FETCH["piece"], block_hash, payload, payload_sha256):
        yield Wire(b"".join((*piece, _uint(_FETCH["tier"], tier))))


def store_requests(block_hash: bytes, payload: bytes, payload_sha256: bytes) -> Iterator[Wire]:
    """The StoreBlocksRequests of one block."""
    for piece in _pieces(_STORE["piece"], block_hash, payload, payload_sha256):
        yield Wire(b"".join(piece))


def _pieces(
    number: int, block_hash: bytes, payload: bytes, payload_sha256: bytes
) -> Iterator[tuple[Chunk, ...]]:
    """BlockPieces as field `number` of what carries them."""
    view = memoryview(payload)
    total = _uint(_PIECE["total_bytes"], len(payload))
    tail = _length(_PIECE["payload_sha256"], len(payload_sha256)) + payload_sha256
    for offset in range(0, len(payload), PIECE_BYTES):
        data = view[offset : offset + PIECE_BYTES]
        head = b"".join(
            (
                _length(_PIECE["block_hash"], len(block_hash)),
                block_hash,
                _uint(_PIECE["offset"], offset),
                total,
                _length(_PIECE["data"], len(data)),
            )
        )
        yield _length(number, len(head) + len(data) + len(tail)) + head, data, tail


def _numbers(descriptor: "Descriptor", fields: Iterable[str]) -> dict[str, int]:
    return {name: descriptor.fields_by_name[name].number for name in fields}


_PULL = _numbers(PullKvResponse.DESCRIPTOR, ["segments"])
_SEGMENT = _numbers(KvSegment.DESCRIPTOR, ["layer", "first_token", "num_tokens", "data", "xxh3"])
_FETCH = _numbers(cache.FetchBlocksResponse.DESCRIPTOR, ["piece", "tier"])
_STORE = _numbers(cache.StoreBlocksRequest.DESCRIPTOR, ["piece"])
_PIECE = _numbers(
    BlockPiece.DESCRIPTOR, ["block_hash", "offset", "total_bytes", "data", "payload_sha256"]
)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _uint(number: int, value: int) -> bytes:
    """A field of any integer type that is written as it is; zero is left out, as proto3 has it."""
    return _varint(number << 3 | _VARINT) + _varint(value) if value else b""


def _fixed64(number: int, value: int) -> bytes:
    return _varint(number << 3 | _FIXED64) + value.to_bytes(8, "little") if value else b""


def _length(number: int, num_bytes: int) -> bytes:
    """What stands before a bytes or message field."""
    return _varint(number << 3 | _LENGTH) + _varint(num_bytes)
