"""Absorbed decode attention over latent pages, at DeepSeek-V3's widths, heads whole and split.

Floor: each latent read once; with 128 heads, or 64 and two query tokens, the products.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import peers
from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.mla_decode import mla_decode

KV_LORA, ROPE = 512, 64
WIDTH = KV_LORA + ROPE
SCALE = 192**-0.5


@dataclass(frozen=True)
class Shape:
    """batch sequences of `length` tokens, or, where ragged, of lengths about it."""

    num_heads: int
    batch: int
    length: int
    num_tokens: int = 1
    ragged: bool = False

    def lengths(self) -> list[int]:
        if not self.ragged:
            return [self.length] * self.batch
        draw = random.Random(self.length)
        return [max(64, round(draw.gauss(self.length, self.length / 2))) for _ in range(self.batch)]


SHAPES = (
    *(Shape(heads, 128, 4096) for heads in (16, 32, 64, 128)),
    *(Shape(heads, 128, 4096, ragged=True) for heads in (16, 128)),
    *(Shape(heads, batch, 4096) for heads in (16, 128) for batch in (1, 16)),
    Shape(128, 128, 16384),
    Shape(64, 128, 4096, num_tokens=2),
)


def works() -> Iterator[Work]:
    for shape in SHAPES:
        lengths = shape.lengths()
        rows = shape.num_tokens * shape.num_heads
        others = {"FlashMLA": partial(a_peer, shape=shape, prepare=peers.flash_mla)}
        if shape.num_tokens == 1:
            others["SGLang Triton"] = partial(a_peer, shape=shape, prepare=peers.sglang_decode)
        yield Work(
            case=f"H={shape.num_heads} B={shape.batch} KV={shape.length}"
            f"{' ragged' if shape.ragged else ''} S={shape.num_tokens}",
            build=partial(ours, shape=shape),
            num_bytes=2 * (sum(lengths) * WIDTH + shape.batch * rows * (WIDTH + KV_LORA)),
            flops=2 * rows * sum(lengths) * (WIDTH + KV_LORA),
            peers=others,
        )


def ours(seed: int, shape: Shape) -> Call:
    inputs = make_inputs(seed, shape)
    return lambda: mla_decode(*inputs, kv_lora_rank=KV_LORA, scale=SCALE)


def a_peer(seed: int, shape: Shape, prepare: Callable[..., Call]) -> Call:
    return prepare(*make_inputs(seed, shape), kv_lora_rank=KV_LORA, scale=SCALE)


def make_inputs(seed: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, pool, tables and lengths; a sequence's blocks lie anywhere in the pool."""
    generator = torch.Generator("cuda").manual_seed(seed)
    lengths = shape.lengths()
    counts = [-(-length // 64) for length in lengths]
    blocks = torch.randperm(sum(counts), generator=generator, device="cuda").int()
    tables = torch.zeros(shape.batch, max(counts), dtype=torch.int32, device="cuda")
    for row, own in enumerate(torch.split(blocks, counts)):
        tables[row, : len(own)] = own
    pool = torch.empty(sum(counts), 64, WIDTH, device="cuda", dtype=torch.bfloat16)
    pool.normal_(generator=generator)
    heads = (shape.batch, shape.num_tokens, shape.num_heads, WIDTH)
    query = torch.randn(heads, generator=generator, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return query if shape.num_tokens > 1 else query[:, 0], pool, tables, lens
