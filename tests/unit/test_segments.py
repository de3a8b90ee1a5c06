"""Latents as bytes: bitwise out and in, and nothing bad lands."""

import numpy as np
import pytest
import torch

from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1.prefill_service_pb2 import PullKvResponse
from tidemill.engine import BlockPool, KvLayout
from tidemill.errors import TransferError
from tidemill.kv.segments import (
    Landing,
    LatentMemory,
    LatentRange,
    SharedLayout,
    bytes_per_token,
    from_bytes,
    pack,
    pack_shared,
    to_bytes,
)
from tidemill.kv.shm import Bytes

LAYERS, DIM, TOKENS = 3, 48, 150


def make_pool(dtype: torch.dtype, *, seed: int | None = None) -> BlockPool:
    pool = BlockPool(num_layers=LAYERS, num_blocks=8, latent_dim=DIM, dtype=dtype)
    if seed is not None:
        values = torch.randn(pool.latents.shape, generator=torch.Generator().manual_seed(seed))
        pool.latents.copy_(values)
    return pool


def layout(dtype: str) -> KvLayout:
    return KvLayout(dtype=dtype, num_layers=LAYERS, latent_dim=DIM, model_digest=b"m" * 32)


def land(pool: BlockPool, *, first_token: int = 0) -> Landing:
    return Landing(pool, layout("float32"), [5, 1, 2], first_token=first_token, num_tokens=TOKENS)


def segments_of(message: bytes) -> list[KvSegment]:
    return list(PullKvResponse.FromString(message).segments)


def all_segments(pool: BlockPool, *, first_token: int = 0) -> list[KvSegment]:
    ranges = [LatentRange(layer, first_token, TOKENS) for layer in range(LAYERS)]
    return segments_of(pack(LatentMemory(pool), [7, 0, 3], ranges))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_moved_latents_are_bitwise_those_that_were_computed(dtype: str) -> None:
    source = make_pool(getattr(torch, dtype), seed=1)
    sink = make_pool(getattr(torch, dtype))
    landing = Landing(sink, layout(dtype), [5, 1, 2], first_token=10, num_tokens=TOKENS)
    memory = LatentMemory(source)
    for layer in range(LAYERS):
        for part in ((10, 64), (64, TOKENS)):
            message = pack(memory, [7, 0, 3], [LatentRange(layer, *part)])
            landing.write(segments_of(message))
    landing.check_complete()
    for layer in range(LAYERS):
        sent = source.read(layer, [7, 0, 3], 10, TOKENS)
        assert torch.equal(sink.read(layer, [5, 1, 2], 10, TOKENS), sent)
    assert landing.num_bytes == LAYERS * (TOKENS - 10) * bytes_per_token(layout(dtype))


def shared_segments(source: BlockPool, window: Bytes) -> list[KvSegment]:
    places = SharedLayout(layout("float32"), first_token=10, num_tokens=TOKENS)
    ranges = [LatentRange(layer, 10, TOKENS) for layer in range(LAYERS)]
    memory = LatentMemory(source)
    segments = segments_of(pack_shared(memory, [7, 0, 3], ranges, window=window, places=places))
    assert not any(segment.data for segment in segments)
    return segments


@pytest.mark.parametrize("source_table", [[7, 0, 3], [3, 4, 5]])
def test_latents_moved_through_shared_memory_are_bitwise_the_same(source_table: list[int]) -> None:
    source, sink = make_pool(torch.float32, seed=1), make_pool(torch.float32)
    landing = land(sink, first_token=10)
    window = np.full(landing.shared.num_bytes, 0xFF, dtype=np.uint8)
    ranges = [
        LatentRange(layer, *part) for layer in range(LAYERS) for part in ((10, 64), (64, TOKENS))
    ]
    message = pack_shared(
        LatentMemory(source), source_table, ranges, window=window, places=landing.shared
    )
    landing.write(segments_of(message), window)
    landing.check_complete()
    for layer in range(LAYERS):
        sent = source.read(layer, source_table, 10, TOKENS)
        assert torch.equal(sink.read(layer, [5, 1, 2], 10, TOKENS), sent)
    assert landing.num_bytes == len(window)


def test_latents_on_a_device_take_the_same_way_through_host_memory() -> None:
    source, sink = make_pool(torch.bfloat16, seed=1), make_pool(torch.bfloat16)
    memories = [LatentMemory(pool) for pool in (source, sink)]
    on_host, checksum = memories[0].look(1, [7, 0, 3], 10, TOKENS)
    for memory in memories:
        memory._layers = None  # as where the pool is not in host memory
    on_device, same = memories[0].look(1, [7, 0, 3], 10, TOKENS)
    assert (b"".join(on_device), same) == (b"".join(on_host), checksum)
    window = np.zeros(len(b"".join(on_host)), dtype=np.uint8)
    assert memories[0].copy_out(1, [7, 0, 3], 10, TOKENS, into=window) == checksum
    assert memories[1].copy_in(1, [5, 1, 2], 10, window) == checksum
    sent = source.read(1, [7, 0, 3], 10, TOKENS)
    assert torch.equal(sink.read(1, [5, 1, 2], 10, TOKENS), sent)


def test_bad_shared_segments_are_refused() -> None:
    source = make_pool(torch.float32, seed=1)
    landing = land(make_pool(torch.float32), first_token=10)
    window = np.zeros(landing.shared.num_bytes, dtype=np.uint8)
    first, *_ = shared_segments(source, window)
    elsewhere = KvSegment()
    elsewhere.CopyFrom(first)
    elsewhere.shm_offset += 4
    nowhere = KvSegment()
    nowhere.CopyFrom(first)
    nowhere.ClearField("shm_offset")
    for bad in (elsewhere, nowhere):
        with pytest.raises(TransferError, match="not where it belongs"):
            landing.write([bad], window)
    window[100] ^= 1
    with pytest.raises(TransferError, match="checksum"):
        landing.write([first], window)
    window[100] ^= 1
    landing.write([first], window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_tensor_restore_it(dtype: torch.dtype) -> None:
    values = torch.randn(5, 7).to(dtype)
    assert torch.equal(from_bytes(to_bytes(values), dtype).view(5, 7), values)


def test_a_flipped_bit_is_refused_and_stores_nothing() -> None:
    sink = make_pool(torch.float32)
    (segment, *_) = all_segments(make_pool(torch.float32, seed=1))
    segment.data = bytes([segment.data[0] ^ 1]) + segment.data[1:]
    with pytest.raises(TransferError, match="checksum"):
        land(sink).write([segment])
    assert not sink.latents.any()


def test_segments_out_of_order_or_out_of_bounds_are_refused() -> None:
    source = make_pool(torch.float32, seed=1)
    first, *_ = all_segments(source)
    for change in ({"first_token": 1}, {"num_tokens": TOKENS + 1}, {"layer": LAYERS}):
        bad = KvSegment()
        bad.CopyFrom(first)
        for name, value in change.items():
            setattr(bad, name, value)
        with pytest.raises(TransferError):
            land(make_pool(torch.float32)).write([bad])
    landing = land(make_pool(torch.float32))
    landing.write([first])
    with pytest.raises(TransferError):
        landing.write([first])


def test_a_transfer_that_ends_early_is_noticed() -> None:
    landing = land(make_pool(torch.float32))
    landing.write(all_segments(make_pool(torch.float32, seed=1))[:-1])
    with pytest.raises(TransferError, match=f"layer {LAYERS - 1}"):
        landing.check_complete()
