"""Latents as bytes on the wire, with the checksum that the puller verifies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.engine import BlockPool, KvLayout
from tidemill.errors import TransferError


@dataclass(frozen=True)
class LatentRange:
    """Positions [start, end) of one layer."""

    layer: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        """Positions in the range."""
        return self.end - self.start


def to_bytes(values: Tensor) -> bytes:
    """The elements of `values` in memory order, little-endian."""
    return values.contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """A one-dimensional tensor of the elements in `data`; its memory is its own."""
    return torch.frombuffer(bytearray(data), dtype=dtype)


def pack(
    pool: BlockPool, block_table: Sequence[int], ranges: Sequence[LatentRange]
) -> pb.PullKvResponse:
    """Copy `ranges` out of the pool into a message, each sealed with its xxh3-64. For a thread."""
    message = pb.PullKvResponse()
    for part in ranges:
        data = to_bytes(pool.read(part.layer, block_table, part.start, part.end))
        message.segments.add(
            layer=part.layer,
            first_token=part.start,
            num_tokens=part.num_tokens,
            data=data,
            xxh3=xxhash.xxh3_64_intdigest(data),
        )
    return message


def bytes_per_token(layout: KvLayout) -> int:
    """Bytes of one token's latents in one layer."""
    return layout.block_bytes // (layout.num_layers * layout.block_tokens)


class Landing:
    """Where pulled latents land: blocks of the puller's pool for tokens [first_token, num_tokens).

    Every layer must arrive whole and in order, whatever the order of the layers.
    """

    def __init__(
        self,
        pool: BlockPool,
        layout: KvLayout,
        block_table: Sequence[int],
        *,
        first_token: int,
        num_tokens: int,
    ) -> None:
        self.num_bytes = 0
        self._pool = pool
        self._block_table = block_table
        self._num_tokens = num_tokens
        self._token_bytes = bytes_per_token(layout)
        self._latent_dim = layout.latent_dim
        self._next = [first_token] * layout.num_layers

    def write(self, segments: Sequence[KvSegment]) -> None:
        """Verify and store; TransferError and nothing stored for a bad segment. For a thread."""
        for segment in segments:
            data = segment.data  # each look at the field copies it
            self._verify(segment, data)
            values = from_bytes(data, self._pool.latents.dtype).view(-1, self._latent_dim)
            self._pool.write(segment.layer, self._block_table, segment.first_token, values)
            self._next[segment.layer] += segment.num_tokens
            self.num_bytes += len(data)

    def check_complete(self) -> None:
        """Raise TransferError unless every layer has landed up to the last token."""
        missing = [layer for layer, end in enumerate(self._next) if end != self._num_tokens]
        if missing:
            layer = missing[0]
            end = f"token {self._next[layer]} of {self._num_tokens} in layer {layer}"
            raise TransferError(f"the hand-over ended at {end}")

    def _verify(self, segment: KvSegment, data: bytes) -> None:
        where = f"layer {segment.layer}, tokens from {segment.first_token}"
        if segment.layer >= len(self._next):
            raise TransferError(f"{where}: there are {len(self._next)} layers")
        end = segment.first_token + segment.num_tokens
        if segment.first_token != self._next[segment.layer] or end > self._num_tokens:
            raise TransferError(f"{where}: expected token {self._next[segment.layer]}")
        if len(data) != segment.num_tokens * self._token_bytes:
            raise TransferError(f"{where}: {len(data)} bytes for {segment.num_tokens} tokens")
        if xxhash.xxh3_64_intdigest(data) != segment.xxh3:
            raise TransferError(f"{where}: the checksum differs")
