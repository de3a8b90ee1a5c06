"""Cache blocks as pieces on the wire: splitting a payload, and putting one together again."""

import hashlib
from collections.abc import Iterator

from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.errors import InvalidRequest

HASH_BYTES = 32
PIECE_BYTES = 1 << 20  # a larger message would hold the event loop for too long at either end
MAX_PIECE_BYTES = 4 << 20  # the proto's bound


def sha256(payload: bytes) -> bytes:
    """SHA-256 over a payload [32 bytes]; releases the GIL, so it may run in a thread."""
    return hashlib.sha256(payload).digest()


def split(block_hash: bytes, payload: bytes, payload_sha256: bytes) -> Iterator[BlockPiece]:
    """The pieces of one block in order, each at most PIECE_BYTES of payload."""
    for offset in range(0, len(payload), PIECE_BYTES):
        yield BlockPiece(
            block_hash=block_hash,
            offset=offset,
            total_bytes=len(payload),
            data=payload[offset : offset + PIECE_BYTES],
            payload_sha256=payload_sha256,
        )


class Assembly:
    """One block on its way in: takes its pieces in order, and only those.

    It bounds every field of a piece itself, since the validator would copy the data once more.
    With `keep=False` it checks the pieces' order and forgets their bytes. Memory grows with the
    bytes that arrived, never with what the first piece announced.
    """

    def __init__(self, first: BlockPiece, *, max_bytes: int, keep: bool = True) -> None:
        if len(first.block_hash) != HASH_BYTES:
            raise _out_of_order("block_hash", f"must be {HASH_BYTES} bytes")
        if len(first.payload_sha256) != HASH_BYTES:
            raise _out_of_order("payload_sha256", f"must be {HASH_BYTES} bytes")
        if not 0 < first.total_bytes <= max_bytes:
            raise _out_of_order("total_bytes", f"must be between 1 and {max_bytes}")
        self.block_hash = first.block_hash
        self.total_bytes = first.total_bytes
        self.payload_sha256 = first.payload_sha256
        self.num_bytes = 0
        self._keep = keep
        self._parts: list[bytes] = []
        self.add(first)

    @property
    def complete(self) -> bool:
        """Whether the last byte has arrived."""
        return self.num_bytes == self.total_bytes

    def add(self, piece: BlockPiece) -> None:
        """Take the next piece. Raises InvalidRequest for any other than the next of this block."""
        if piece.block_hash != self.block_hash:
            raise _out_of_order("block_hash", "the block before is not complete")
        if piece.total_bytes != self.total_bytes or piece.payload_sha256 != self.payload_sha256:
            raise _out_of_order("total_bytes", "differs from the block's first piece")
        if piece.offset != self.num_bytes:
            raise _out_of_order("offset", f"must be {self.num_bytes}")
        data = piece.data  # once: each look at a protobuf field is a copy of it
        if not 0 < len(data) <= MAX_PIECE_BYTES:
            raise _out_of_order("data", f"must be 1 to {MAX_PIECE_BYTES} bytes")
        if self.num_bytes + len(data) > self.total_bytes:
            raise _out_of_order("data", "passes the end of the block")
        self.num_bytes += len(data)
        if self._keep:
            self._parts.append(data)

    def payload(self) -> bytes:
        """The whole payload, its checksum not yet compared; complete and kept blocks only."""
        assert self.complete
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def _out_of_order(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(
        f"block piece: {field} {problem}", violations=[(f"piece.{field}", problem)]
    )
