"""DeepSeek-V3's experts in FP8: a whole layer for few tokens, and shards of expert parallelism.

A layer's row covers what follows the router: rounding the tokens, gate and up, SwiGLU, down, the
sum with shared expert and residual. Floor: the weights of the experts that somebody chose, read
once. Shards are single products, as DeepGEMM publishes them; ours of gate and up holds SwiGLU and
its rounding too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import peers
from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.act_quant import Quantized, act_quant
from tidemill.kernels.grouped_gemm import combine, down, gate_up

EXPERTS, TOP_K, HIDDEN, WIDTH = 256, 8, 7168, 2048  # DeepSeek-V3
EXPERT_BYTES = 3 * HIDDEN * WIDTH
LAYER_TOKENS = (1, 16, 64, 128, 256)
MASKED = ((1, 1024), (2, 512), (4, 256))  # experts of a decode shard, rows of each
PREFILL = (9, 14_464)  # experts of a prefill shard of 32, rows of each
PRODUCTS = {"gate_up": (2 * WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}  # columns, depth
Weight = tuple[Tensor, Tensor]  # e4m3 and its scales
_layer: list["Experts"] = []


@dataclass(frozen=True)
class Experts:
    """One layer's, products of order one."""

    gate_up: Weight
    down: Weight


def works() -> Iterator[Work]:
    for num_tokens in LAYER_TOKENS:
        active = int(torch.bincount(routed(0, num_tokens)[1].flatten()).count_nonzero())
        yield Work(
            case=f"layer T={num_tokens}, {active} experts",
            build=partial(layer, num_tokens=num_tokens),
            num_bytes=active * EXPERT_BYTES + num_tokens * HIDDEN * 2 * 4,
            flops=num_tokens * TOP_K * 2 * EXPERT_BYTES,
            matmul="fp8",
            peers={"sglang": partial(sglang_layer, num_tokens=num_tokens)},
        )
    for num_experts, rows in (*MASKED, PREFILL):
        for product, (columns, depth) in PRODUCTS.items():
            build = partial(shard, num_experts=num_experts, rows=rows, product=product)
            out_bytes = WIDTH if product == "gate_up" else 2 * columns
            yield Work(
                case=f"{num_experts} x {rows} {product}",
                build=build,
                num_bytes=num_experts * (columns * depth + rows * (depth + out_bytes)),
                flops=2 * num_experts * rows * columns * depth,
                matmul="fp8",
                peers={"deep_gemm": partial(build, theirs=True)},
            )


def layer(seed: int, num_tokens: int) -> Call:
    experts = all_experts()
    weights, ids = (each.cuda() for each in routed(seed, num_tokens))
    x, shared = tokens(seed, num_tokens), tokens(seed + 1, num_tokens)
    places = sorted_places(ids, EXPERTS)

    def call() -> Tensor:
        hidden = gate_up(act_quant(x), *experts.gate_up, **places, top_k=TOP_K)
        return combine(down(hidden, *experts.down, **places, weights=weights), x, shared)

    return call


def sglang_layer(seed: int, num_tokens: int, tile: Mapping[str, int] | None = None) -> Call:
    """Theirs plus the two sums, which ours holds; `tile` for the tuner."""
    experts = all_experts()
    weights, ids = (each.cuda() for each in routed(seed, num_tokens))
    x, shared = tokens(seed, num_tokens), tokens(seed + 1, num_tokens)
    call = peers.sglang_moe(x, weights, ids, *experts.gate_up, *experts.down, tile=tile)

    def with_sums() -> Tensor:
        routed_sum = call()
        assert isinstance(routed_sum, Tensor)
        return routed_sum + shared + x

    return with_sums


def shard(seed: int, num_experts: int, rows: int, product: str, *, theirs: bool = False) -> Call:
    """One product of `rows` rows of each expert."""
    generator = torch.Generator("cuda").manual_seed(seed)
    columns, depth = PRODUCTS[product]
    weight, scale_inv = some_weights(num_experts, columns, depth, generator)
    x = torch.randn(num_experts * rows, depth, generator=generator, device="cuda")
    quantized = act_quant(x.bfloat16())
    counts = torch.full((num_experts,), rows, dtype=torch.int32, device="cuda")
    if theirs:
        return deep_gemm(quantized, weight, scale_inv, counts, rows)
    starts = torch.arange(num_experts, dtype=torch.int32, device="cuda") * rows
    op = gate_up if product == "gate_up" else down
    return lambda: op(quantized, weight, scale_inv, starts=starts, counts=counts)


def deep_gemm(x: Quantized, weight: Tensor, scale_inv: Tensor, counts: Tensor, rows: int) -> Call:
    """Their contiguous product for a prefill shard, their masked one for a decode shard."""
    num_experts = len(counts)
    if rows == PREFILL[1]:
        experts = torch.arange(num_experts, dtype=torch.int32, device="cuda")
        of_row = experts.repeat_interleave(rows)
        return peers.deep_gemm_contiguous(x, weight, scale_inv, of_row)
    values = x.values.view(num_experts, rows, -1)
    scales = x.scales.contiguous().view(num_experts, rows, -1)
    given = Quantized(values, scales)
    call = peers.deep_gemm_masked(given, weight, scale_inv, counts, expected_rows=rows)

    def rows_of_all() -> Tensor:
        out = call()
        assert isinstance(out, Tensor)
        return out.flatten(0, 1)

    return rows_of_all


def tokens(seed: int, num_tokens: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(num_tokens, HIDDEN, generator=generator, device="cuda").bfloat16()


def routed(seed: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Weights and ids [T, TOP_K] of a router that likes all experts alike; drawn on the host."""
    generator = torch.Generator().manual_seed(seed)
    weights, ids = torch.rand(num_tokens, EXPERTS, generator=generator).topk(TOP_K)
    return weights / weights.sum(-1, keepdim=True), ids


def sorted_places(ids: Tensor, num_experts: int) -> dict[str, Any]:
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=num_experts)
    return {
        "starts": (counts.cumsum(0) - counts).int(),
        "counts": counts.int(),
        "rows": flat.argsort(stable=True).int(),
    }


def all_experts() -> Experts:
    """The same for all seeds: 11 GB, far more than the cache."""
    if not _layer:
        generator = torch.Generator("cuda").manual_seed(0)
        up, back = (some_weights(EXPERTS, *size, generator) for size in PRODUCTS.values())
        _layer.append(Experts(up, back))
    return _layer[0]


def some_weights(num_experts: int, columns: int, depth: int, generator: torch.Generator) -> Weight:
    made = torch.empty(num_experts, columns, depth, dtype=torch.float8_e4m3fn, device="cuda")
    for each in made:
        each.copy_(torch.randn(each.shape, generator=generator, device="cuda"))
    blocks = num_experts, columns // 128, depth // 128
    scales = torch.rand(blocks, generator=generator, device="cuda") + 0.5
    return made, scales / depth**0.5
