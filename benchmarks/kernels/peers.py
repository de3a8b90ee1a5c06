"""What ours are compared with: others' kernels on our arguments.

Each function prepares whatever a serving loop prepares once a step or once a model, and returns the
call that is timed. An ImportError says that the peer is not there: `fetch_peers.sh` fetches all.
None of these has run on a GPU yet: none was at hand. In the interpreter SGLang's decode and router
give what our references give.
"""

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import sglang_config
from benchmarks.kernels.harness import Call
from tidemill.kernels.act_quant import Quantized, act_quant


def flash_mla(
    query: Tensor,
    latents: Tensor,
    tables: Tensor,
    lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> Call:
    """FlashMLA's dense decode: query [B, (S,) H, 576] bf16, latents [blocks, 64, 576]."""
    theirs = importlib.import_module("flash_mla")
    plan, _ = theirs.get_mla_metadata()
    rows = query if query.ndim == 4 else query.unsqueeze(1)
    pages, tables32, lens32 = latents.unsqueeze(2), tables.int(), lens.int()

    def call() -> Tensor:
        out: Tensor = theirs.flash_mla_with_kvcache(
            rows, pages, tables32, lens32, kv_lora_rank, plan, softmax_scale=scale, causal=True
        )[0]
        return out.view(*query.shape[:-1], kv_lora_rank)

    return call


def deep_gemm_dense(x: Quantized, weight: Tensor, scale_inv: Tensor) -> Call:
    """DeepGEMM: x [T, K] times weight [N, K] -> bf16 [T, N]."""
    theirs = importlib.import_module("deep_gemm")
    out = weight.new_empty(len(x.values), len(weight), dtype=torch.bfloat16)
    given = (x.values, theirs.get_mn_major_tma_aligned_tensor(x.scales.contiguous()))
    return _into(out, lambda: theirs.fp8_gemm_nt(given, (weight, scale_inv), out))


def deep_gemm_contiguous(
    x: Quantized, weight: Tensor, scale_inv: Tensor, expert_of_row: Tensor
) -> Call:
    """DeepGEMM: rows sorted by expert, each expert's padded to a multiple of 128 by rows of -1.

    x [R, K], weight [E, N, K], expert_of_row [R] int32 -> bf16 [R, N].
    """
    theirs = importlib.import_module("deep_gemm")
    out = weight.new_empty(len(x.values), weight.shape[1], dtype=torch.bfloat16)
    given = (x.values, theirs.get_mn_major_tma_aligned_tensor(x.scales.contiguous()))
    return _into(
        out,
        lambda: theirs.m_grouped_fp8_gemm_nt_contiguous(
            given, (weight, scale_inv), out, expert_of_row
        ),
    )


def deep_gemm_masked(
    x: Quantized, weight: Tensor, scale_inv: Tensor, counts: Tensor, expected_rows: int
) -> Call:
    """DeepGEMM: x [E, M, K], of which the first counts [E] int32 rows hold; -> bf16 [E, M, N]."""
    theirs = importlib.import_module("deep_gemm")
    out = weight.new_empty(*x.values.shape[:2], weight.shape[1], dtype=torch.bfloat16)
    given = (x.values, theirs.get_mn_major_tma_aligned_tensor(x.scales.contiguous()))
    return _into(
        out,
        lambda: theirs.fp8_m_grouped_gemm_nt_masked(
            given, (weight, scale_inv), out, counts, expected_rows
        ),
    )


def sglang_decode(
    query: Tensor,
    latents: Tensor,
    tables: Tensor,
    lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
    num_splits: int = 8,  # SGLang's default
) -> Call:
    """SGLang's Triton decode with MLA: query [B, H, D], latents [blocks, 64, D]."""
    theirs = _sglang("attention.decode_attention")
    num_rows, num_heads, dim = query.shape
    page = latents.shape[1]
    keys = latents.view(-1, 1, dim)
    slots = (tables.long().unsqueeze(-1) * page + torch.arange(page, device=tables.device)).flatten(
        1
    )
    indices = torch.cat([row[:length] for row, length in zip(slots, lens.tolist(), strict=True)])
    starts = torch.zeros(num_rows + 1, dtype=torch.int32, device=query.device)
    starts[1:] = lens.cumsum(0)
    partial = torch.empty(
        num_rows, num_heads, num_splits, kv_lora_rank, dtype=torch.float32, device=query.device
    )
    sums = torch.empty_like(partial[..., 0])
    splits = torch.full((num_rows,), num_splits, dtype=torch.int32, device=query.device)
    out = torch.empty_like(query[..., :kv_lora_rank])
    return _into(
        out,
        lambda: theirs.decode_attention_fwd(
            query,
            keys,
            keys[..., :kv_lora_rank],
            out,
            starts,
            indices,
            partial,
            sums,
            splits,
            num_splits,
            scale,
            1.0,
            1.0,
            has_mla=True,
        ),
    )


def sglang_route(
    logits: Tensor, bias: Tensor, *, top_k: int, n_group: int, topk_group: int, scale: float
) -> Call:
    """SGLang's Triton router, sigmoid scores: logits [T, E] -> weights and ids [T, K]."""
    theirs = _sglang("moe.moe_fused_gate")
    return lambda: theirs.moe_fused_gate(
        logits,
        bias,
        top_k,
        routed_scaling_factor=scale,
        apply_routed_scaling_factor_on_output=True,
        num_expert_group=n_group,
        topk_group=topk_group,
    )


def sglang_moe(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    gate_up_scale_inv: Tensor,
    down: Tensor,
    down_scale_inv: Tensor,
    *,
    tile: Mapping[str, int] | None = None,
) -> Call:
    """SGLang's Triton fused MoE in FP8, tuned: x [T, D] bf16, weights and ids [T, K] -> [T, D].

    Its tile is `tile`, or that of the device's tuned file, or, without one, the fastest of all.

    Its order by expert is prepared outside the call and its activations are rounded by our
    act_quant: SGLang takes CUDA kernels for both. The first is to its advantage.
    """
    theirs = _sglang("moe.fused_moe_triton_kernels")
    import triton.language as tl  # noqa: PLC0415 - only where there is a GPU

    num_tokens, top_k = ids.shape
    wide = x.new_empty(num_tokens * top_k, gate_up.shape[1])
    half = x.new_empty(num_tokens * top_k, gate_up.shape[1] // 2)
    parts = x.new_empty(num_tokens, top_k, x.shape[1])
    out = torch.empty_like(x)

    def product(
        rows: Quantized, weight: Tensor, scale: Tensor, into: Tensor, order: Any, tile: Any
    ) -> None:
        last = into is parts
        theirs.invoke_fused_moe_kernel(
            rows.values, weight, None, into, rows.scales, scale, None, weights, ids, *order,
            last, 1 if last else top_k, dict(tile), tl.bfloat16, True, False, False, False, False,
            block_shape=[128, 128],
        )  # fmt: skip

    def with_tile(tile: Mapping[str, int]) -> Call:
        order = expert_order(ids, len(gate_up), tile["BLOCK_SIZE_M"])

        def call() -> Tensor:
            product(act_quant(x), gate_up, gate_up_scale_inv, wide, order, tile)
            theirs.act_and_mul_triton(wide, half, tile, ids)
            product(act_quant(half), down, down_scale_inv, parts, order, tile)
            theirs.moe_sum_reduce_triton(parts, out, 1.0)
            return out

        return call

    device = torch.cuda.get_device_name()
    tuned = sglang_config.path_of(len(gate_up), gate_up.shape[1] // 2, device)
    tile = tile or sglang_config.tile_for(tuned, num_tokens)
    if tile is not None:
        return with_tile(tile)
    return fastest([with_tile(each) for each in sglang_config.USUAL])


def expert_order(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `moe_align_block_size`: choices by expert, padded to blocks; each block's expert; size."""
    flat = ids.flatten().long()
    counts = torch.bincount(flat, minlength=num_experts)
    padded = (counts + block - 1) // block * block
    size = int(padded.sum())
    order = flat.argsort(stable=True)
    place = torch.arange(len(flat), device=ids.device) - (counts.cumsum(0) - counts)[flat[order]]
    places = torch.full((size,), len(flat), dtype=torch.int32, device=ids.device)
    places[(padded.cumsum(0) - padded)[flat[order]] + place] = order.int()
    experts = torch.arange(num_experts, device=ids.device).repeat_interleave(padded // block)
    return places, experts.int(), torch.tensor([size], dtype=torch.int32, device=ids.device)


def fastest(calls: list[Call]) -> Call:
    """The one of `calls` that takes least, of three runs each."""

    def seconds(call: Call) -> float:
        call()
        times = []
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    return min(calls, key=seconds)


def _into(out: Tensor, work: Callable[[], object]) -> Call:
    def call() -> Tensor:
        work()
        return out

    return call


def _sglang(name: str) -> ModuleType:
    """One of SGLang's files of Triton kernels."""
    without_sglang()
    return importlib.import_module(f"sglang.kernels.ops.{name}")


def without_sglang() -> None:
    """Lets SGLang's kernels be imported: in a world where all else of SGLang says no."""
    told = {
        "is_cuda": lambda: True,
        "is_sm90_supported": lambda: True,
        "is_arch_support_pdl": lambda: True,
        "debug_kernel_api": lambda function: function,
        "get_moe_padding_size": lambda _: 0,
        "envs": _Nothing(),
    }
    for absent in (
        "jit",
        "jit.utils",
        "kernel_api_logging",
        "ops.moe.moe_route_radix",
        "ops.quantization",
        "ops.quantization.fp8_kernel",
        "ops.quantization.int8_kernel",
    ):
        sys.modules.setdefault(
            f"sglang.kernels.{absent}", _Absent(f"sglang.kernels.{absent}", told)
        )
    for absent in (
        "",
        ".batch_invariant_ops",
        ".environ",
        ".layers",
        ".layers.moe",
        ".layers.moe.utils",
        ".utils",
    ):
        sys.modules.setdefault(f"sglang.srt{absent}", _Absent(f"sglang.srt{absent}", told))


class _Nothing:
    """Every setting, each off."""

    def __getattr__(self, _: str) -> "_Nothing":
        return self

    def get(self) -> bool:
        return False


class _Absent(ModuleType):
    """A module of SGLang's that was left behind: what is not `told` is a function that says no."""

    def __init__(self, name: str, told: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self._told = told

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._told.get(name, lambda *_, **__: False)
