"""Multi-head prefill attention at DeepSeek-V3's widths: whole prompts, and a chunk after a prefix.

Floor: the products that a causal mask leaves. The peer is torch's own attention for one prompt, on
keys put together before; it takes no prefix of another length than the chunk's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.mla_prefill import mla_prefill_ragged

NOPE, ROPE, V = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5


@dataclass(frozen=True)
class Shape:
    """Prompts with their cached and their new tokens."""

    num_heads: int
    prompts: tuple[tuple[int, int], ...]


SHAPES = (
    Shape(128, ((0, 4096),)),
    Shape(16, ((0, 4096),)),
    Shape(16, ((0, 512), (0, 3000), (0, 1500), (0, 100))),
    Shape(16, ((12288, 4096),)),
    Shape(16, ((2048, 64),) * 16),
)


def works() -> Iterator[Work]:
    for shape in SHAPES:
        rows = sum(new for _, new in shape.prompts)
        keys = sum(cached + new for cached, new in shape.prompts)
        pairs = sum(new * cached + new * (new + 1) // 2 for cached, new in shape.prompts)
        alone = len(shape.prompts) == 1 and shape.prompts[0][0] == 0
        per_head = rows * (NOPE + ROPE + V) + keys * (NOPE + V)
        yield Work(
            case=f"H={shape.num_heads} prompts={len(shape.prompts)} rows={rows} keys={keys}",
            build=partial(ours, shape=shape),
            num_bytes=2 * (shape.num_heads * per_head + keys * ROPE),
            flops=2 * shape.num_heads * pairs * (NOPE + ROPE + V),
            peers={"torch sdpa": partial(a_peer, shape=shape)} if alone else {},
        )


def ours(seed: int, shape: Shape) -> Call:
    query, expanded, k_rope = make_inputs(seed, shape)
    rows, keys = (
        torch.tensor([0, *counts], device="cuda").cumsum(0).int()
        for counts in (
            [new for _, new in shape.prompts],
            [cached + new for cached, new in shape.prompts],
        )
    )
    return lambda: mla_prefill_ragged(query, expanded, k_rope, rows, keys, scale=SCALE)


def a_peer(seed: int, shape: Shape) -> Call:
    query, expanded, k_rope = make_inputs(seed, shape)
    k_nope, value = expanded.tensor_split([NOPE], dim=-1)
    shared = k_rope.unsqueeze(1).expand(-1, shape.num_heads, -1)
    key = torch.cat((k_nope, shared), dim=-1)
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))

    def call() -> Tensor:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)
        return out.squeeze(0).transpose(0, 1)

    return call


def make_inputs(seed: int, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Query, expanded keys and values, and the shared keys as a view of the latents."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        wide = torch.randn(*sizes, generator=generator, device="cuda")
        return wide.bfloat16()

    rows = sum(new for _, new in shape.prompts)
    keys = sum(cached + new for cached, new in shape.prompts)
    return (
        random(rows, shape.num_heads, NOPE + ROPE),
        random(keys, shape.num_heads, NOPE + V),
        random(keys, 512 + ROPE)[:, 512:],
    )
