"""Latents as bytes on the wire, with the checksum that the puller verifies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine import BlockPool, KvLayout
from tidemill.errors import TransferError
from tidemill.kv.shm import Bytes
from tidemill.kv.wire import SegmentsWriter, Wire

RUN_BYTES = 512 << 10  # copied and then hashed while it is in the core's own cache


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


class LatentMemory:
    """A pool's latents as bytes, in runs of neighbouring positions: copied once, hashed while warm.

    A run is at most RUN_BYTES, unless one block is longer. Latents on a device take a detour
    through host memory. Every method is for a thread.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._latent_dim = pool.latents.shape[-1]
        self.token_bytes = self._latent_dim * pool.latents.element_size()
        self._layers: Bytes | None = None
        if pool.latents.device.type == "cpu":
            self._layers = pool.latents.view(torch.uint8).numpy().reshape(len(pool.latents), -1)

    def look(
        self, layer: int, block_table: Sequence[int], start: int, end: int
    ) -> tuple[list[memoryview], int]:
        """Elements of positions [start, end) where they lie, in runs, and their xxh3-64."""
        checksum = xxhash.xxh3_64()
        runs = [run.data for run in self._runs(layer, block_table, start, end)]
        for run in runs:
            checksum.update(run)
        return runs, checksum.intdigest()

    def copy_out(
        self, layer: int, block_table: Sequence[int], start: int, end: int, *, into: Bytes
    ) -> int:
        """Copy positions [start, end) into memory of that length; returns their xxh3-64."""
        checksum = xxhash.xxh3_64()
        done = 0
        for run in self._runs(layer, block_table, start, end):
            target = into[done : done + len(run)]
            target[:] = run
            checksum.update(target.data)
            done += len(run)
        return checksum.intdigest()

    def copy_in(self, layer: int, block_table: Sequence[int], start: int, values: Bytes) -> int:
        """Store elements from position `start` on; returns the xxh3-64 of what is there then."""
        checksum = xxhash.xxh3_64()
        for stored in self._store(layer, block_table, start, values):
            checksum.update(stored.data)
        return checksum.intdigest()

    def write(self, layer: int, block_table: Sequence[int], start: int, values: Bytes) -> None:
        """Store elements from position `start` on."""
        for _ in self._store(layer, block_table, start, values):
            pass

    def _store(
        self, layer: int, block_table: Sequence[int], start: int, values: Bytes
    ) -> Iterator[Bytes]:
        """Store elements; yields each run as it is now."""
        if self._layers is None:
            stored = values.copy()
            elements = torch.from_numpy(stored).view(self._pool.latents.dtype)
            rows = elements.view(-1, self._latent_dim).to(self._pool.latents.device)
            self._pool.write(layer, block_table, start, rows)
            yield stored
            return
        end = start + len(values) // self.token_bytes
        done = 0
        for run in self._runs(layer, block_table, start, end):
            run[:] = values[done : done + len(run)]
            yield run
            done += len(run)

    def _runs(
        self, layer: int, block_table: Sequence[int], start: int, end: int
    ) -> Iterator[Bytes]:
        if self._layers is None:
            values = self._pool.read(layer, block_table, start, end).cpu()
            yield values.view(-1).view(torch.uint8).numpy()
            return
        memory, token_bytes = self._layers[layer], self.token_bytes
        most_blocks = max(RUN_BYTES // (BLOCK_TOKENS * token_bytes), 1)
        while start < end:
            index, offset = divmod(start, BLOCK_TOKENS)
            last = (end - 1) // BLOCK_TOKENS
            stop = index + 1
            while stop <= last and stop - index < most_blocks:
                if block_table[stop] != block_table[stop - 1] + 1:
                    break
                stop += 1
            num_tokens = min(stop * BLOCK_TOKENS, end) - start
            first = block_table[index] * BLOCK_TOKENS + offset
            yield memory[first * token_bytes : (first + num_tokens) * token_bytes]
            start += num_tokens


def pack(memory: LatentMemory, block_table: Sequence[int], ranges: Sequence[LatentRange]) -> Wire:
    """A PullKvResponse: `ranges` out of the pool, each sealed with its xxh3-64. For a thread."""
    message = SegmentsWriter()
    for part in ranges:
        data, checksum = memory.look(part.layer, block_table, part.start, part.end)
        message.add(
            layer=part.layer,
            first_token=part.start,
            num_tokens=part.num_tokens,
            xxh3=checksum,
            data=data,
        )
    return message.finish()


class SharedLayout:
    """Where in shared memory the latents of tokens [first_token, num_tokens) lie: layer-major."""

    def __init__(self, layout: KvLayout, *, first_token: int, num_tokens: int) -> None:
        self._token_bytes = bytes_per_token(layout)
        self._first_token = first_token
        self._num_tokens = num_tokens - first_token
        self.num_bytes = layout.num_layers * self._num_tokens * self._token_bytes

    def offset(self, layer: int, token: int) -> int:
        """Byte offset of one token's latents."""
        return (layer * self._num_tokens + token - self._first_token) * self._token_bytes


def pack_shared(
    memory: LatentMemory,
    block_table: Sequence[int],
    ranges: Sequence[LatentRange],
    *,
    window: Bytes,
    places: SharedLayout,
) -> Wire:
    """Copy `ranges` out of the pool into shared memory; the message says where. For a thread."""
    message = pb.PullKvResponse()
    for part in ranges:
        offset = places.offset(part.layer, part.start)
        into = window[offset : offset + part.num_tokens * memory.token_bytes]
        message.segments.add(
            layer=part.layer,
            first_token=part.start,
            num_tokens=part.num_tokens,
            shm_offset=offset,
            xxh3=memory.copy_out(part.layer, block_table, part.start, part.end, into=into),
        )
    return Wire(message.SerializeToString())


def bytes_per_token(layout: KvLayout) -> int:
    """Bytes of one token's latents in one layer."""
    return layout.block_bytes // (layout.num_layers * layout.block_tokens)


class Landing:
    """Where pulled latents land: blocks of the puller's pool for tokens [first_token, num_tokens).

    Every layer must arrive whole and in order, whatever the order of the layers. Segments come
    with their data, or lie in shared memory.
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
        self.shared = SharedLayout(layout, first_token=first_token, num_tokens=num_tokens)
        self._memory = LatentMemory(pool)
        self._block_table = block_table
        self._num_tokens = num_tokens
        self._next = [first_token] * layout.num_layers

    def write(self, segments: Sequence[KvSegment], window: Bytes | None = None) -> None:
        """Verify and store; TransferError for a bad segment. For a thread.

        `window` is the shared memory of this pull; None: segments bring their data.
        """
        for segment in segments:
            where = f"layer {segment.layer}, tokens from {segment.first_token}"
            self._check_place(segment, where)
            if window is None:
                sound = self._land(segment, where)
            else:
                sound = self._land_shared(segment, window, where)
            if not sound:
                raise TransferError(f"{where}: the checksum differs")
            self._next[segment.layer] += segment.num_tokens
            self.num_bytes += segment.num_tokens * self._memory.token_bytes

    def check_complete(self) -> None:
        """Raise TransferError unless every layer has landed up to the last token."""
        missing = [layer for layer, end in enumerate(self._next) if end != self._num_tokens]
        if missing:
            layer = missing[0]
            end = f"token {self._next[layer]} of {self._num_tokens} in layer {layer}"
            raise TransferError(f"the hand-over ended at {end}")

    def _check_place(self, segment: KvSegment, where: str) -> None:
        if segment.layer >= len(self._next):
            raise TransferError(f"{where}: there are {len(self._next)} layers")
        end = segment.first_token + segment.num_tokens
        if segment.first_token != self._next[segment.layer] or end > self._num_tokens:
            raise TransferError(f"{where}: expected token {self._next[segment.layer]}")

    def _land(self, segment: KvSegment, where: str) -> bool:
        data = segment.data  # each look at the field copies it
        if len(data) != segment.num_tokens * self._memory.token_bytes:
            raise TransferError(f"{where}: {len(data)} bytes for {segment.num_tokens} tokens")
        if xxhash.xxh3_64_intdigest(data) != segment.xxh3:
            return False
        values = np.frombuffer(data, dtype=np.uint8)
        self._memory.write(segment.layer, self._block_table, segment.first_token, values)
        return True

    def _land_shared(self, segment: KvSegment, window: Bytes, where: str) -> bool:
        """Hashes what landed, since shared memory may change after a look at it."""
        offset = self.shared.offset(segment.layer, segment.first_token)
        if not segment.HasField("shm_offset") or segment.shm_offset != offset:
            raise TransferError(f"{where}: not where it belongs in shared memory")
        values = window[offset : offset + segment.num_tokens * self._memory.token_bytes]
        checksum = self._memory.copy_in(
            segment.layer, self._block_table, segment.first_token, values
        )
        return checksum == segment.xxh3
