"""Experts' products in Triton: E experts, R places sorted by expert, top_k choices a token.

D hidden and I intermediate elements. A persistent grid walks all experts' tiles; how many there are
and whose a tile is comes from `counts`, on the device. Within an expert its weight is walked column
tile after column tile, so that each is read from memory once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidemill.kernels.act_quant import Quantized
from tidemill.kernels.aot import Variant
from tidemill.kernels.device import H100, num_sms
from tidemill.kernels.fp8_gemm.configs import Tile
from tidemill.kernels.fp8_gemm.kernel import (
    arrives_last,
    multiply,
    place_in_group,
    scratch,
    sum_parts,
)
from tidemill.kernels.grouped_gemm.configs import (
    DOWN_TILES,
    GATE_UP_TILES,
    column_tiles,
    experts_held,
    most_row_tiles,
    splits_for,
    tile_for,
)
from tidemill.kernels.tiles import all_tiles

_COMBINE_BLOCK = 1024


@triton.jit
def _last_tiles(
    counts_ptr, num_experts, column_tiles, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr
):
    """How many tiles the experts up to each have in all, [EXPERTS], a power of two."""
    expert = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + expert, mask=expert < num_experts, other=0)
    return tl.cumsum(tl.cdiv(counts, BLOCK_M) * column_tiles, 0)


@triton.jit
def _find_tile(
    tile,
    ends,
    counts_ptr,
    column_tiles,
    BLOCK_M: tl.constexpr,
    ROW_GROUP: tl.constexpr,
):
    """Expert, row tile, column tile."""
    done = ends <= tile
    expert = tl.sum(done.to(tl.int32), 0)
    within_expert = tile - tl.max(tl.where(done, ends, 0), 0)
    count = tl.load(counts_ptr + expert)
    row_tile, column_tile = place_in_group(
        within_expert, tl.cdiv(count, BLOCK_M), column_tiles, ROW_GROUP
    )
    return expert.to(tl.int64), row_tile, column_tile


@triton.jit
def _places(starts_ptr, counts_ptr, expert, row_tile, BLOCK_M: tl.constexpr):
    """The row tile's BLOCK_M places; past the expert's last one, that again: loads need no mask."""
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.load(starts_ptr + expert) + tl.minimum(m, tl.load(counts_ptr + expert) - 1)


@triton.jit
def _places_to_store(starts_ptr, counts_ptr, expert, row_tile, BLOCK_M: tl.constexpr):
    """The row tile's places and which of them are the expert's.

    Made anew after the sums: what lives through their loop takes registers from it. The loads are
    volatile, or the compiler would know these places from those before the loop.
    """
    count = tl.load(counts_ptr + expert, volatile=True)
    start = tl.load(starts_ptr + expert, volatile=True)
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return start + m, m < count


@triton.jit
def _gate_up_kernel(
    x_ptr,  # [T, D]
    x_scale_ptr,  # [T, D / 128] where SCALED
    w_ptr,  # [E, 2 * I, D]; where TMA a descriptor of [E * 2 * I, D]
    w_scale_ptr,  # [E, 2 * I / 128, D / 128] where SCALED
    out_ptr,  # [R, I]
    out_scale_ptr,  # [R, I / 128] where SCALED, next to each other the scales of a column
    parts_ptr,  # [SPLITS, R, 2 * I] fp32: each split's sums; None of one
    counters_ptr,  # `tile_counters`; None of one split
    rows_ptr,  # [R] flat choices where GATHER
    starts_ptr,  # [E]
    counts_ptr,  # [E]
    num_experts,
    num_places,
    width,  # I
    depth,  # D
    top_k,
    stride_xt,
    stride_xst,
    stride_xsk,
    SCALED: tl.constexpr,
    GATHER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    ROW_GROUP: tl.constexpr,
):
    column_tiles = tl.cdiv(width, BLOCK_N)
    ends = _last_tiles(counts_ptr, num_experts, column_tiles, EXPERTS, BLOCK_M)
    steps = tl.cdiv(depth, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    for item in range(tl.program_id(0), tl.max(ends, 0) * SPLITS, tl.num_programs(0)):
        split = item % SPLITS
        expert, row_tile, column_tile = _find_tile(
            item // SPLITS, ends, counts_ptr, column_tiles, BLOCK_M, ROW_GROUP
        )
        place = _places(starts_ptr, counts_ptr, expert, row_tile, BLOCK_M)
        if GATHER:
            source = (tl.load(rows_ptr + place) // top_k).to(tl.int64)
            x_rows = x_ptr + source * stride_xt
        else:
            # Steps within the tile fit 32 bits: half the registers of so many addresses.
            source = place.to(tl.int64)
            first = tl.load(starts_ptr + expert) + row_tile * BLOCK_M
            x_rows = x_ptr + first.to(tl.int64) * stride_xt + (place - first) * stride_xt
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if TMA:
            gate_rows = (expert * 2 * width + column_tile * BLOCK_N).to(tl.int32)
            up_rows = gate_rows + width
        else:
            columns = expert * 2 * width + tl.minimum(n, width - 1)
            gate_rows = w_ptr + columns * depth
            up_rows = w_ptr + (columns + width) * depth
        x_scales = x_ptr
        gate_scales = x_ptr
        up_scales = x_ptr
        if SCALED:
            x_scales = x_scale_ptr + source * stride_xst
            scale_tile = expert * 2 * (width // BLOCK_N) + column_tile
            gate_scales = w_scale_ptr + scale_tile * steps
            up_scales = gate_scales + width // BLOCK_N * steps
        gate, up = multiply(
            x_rows,
            x_scales,
            stride_xsk,
            w_ptr,
            gate_rows,
            gate_scales,
            up_rows,
            up_scales,
            depth,
            split * share,
            tl.minimum((split + 1) * share, steps),
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SCALED,
            PAIR=True,
            SWAP=SWAP,
            TMA=TMA,
            EVEN_K=EVEN_K,
        )
        place, valid = _places_to_store(starts_ptr, counts_ptr, expert, row_tile, BLOCK_M)
        if SPLITS == 1:
            _store_hidden(
                gate, up, out_ptr, out_scale_ptr, place, valid, column_tile, width, num_places, SWAP
            )
        else:
            if SWAP:
                gate = gate.T
                up = up.T
            stride = tl.cast(num_places, tl.int64) * 2 * width
            elements = place.to(tl.int64)[:, None] * 2 * width + n[None, :]
            part_ptrs = parts_ptr + split * stride + elements
            within = valid[:, None] & (n < width)[None, :]
            tl.store(part_ptrs, gate, mask=within)
            tl.store(part_ptrs + width, up, mask=within)
            if arrives_last(counters_ptr + item // SPLITS, SPLITS):
                _store_hidden(
                    sum_parts(parts_ptr, elements, stride, within, SPLITS),
                    sum_parts(parts_ptr + width, elements, stride, within, SPLITS),
                    out_ptr,
                    out_scale_ptr,
                    place,
                    valid,
                    column_tile,
                    width,
                    num_places,
                    SWAP=False,
                )


@triton.jit
def _store_hidden(
    gate, up, out_ptr, scale_ptr, place, valid, column_tile, width, num_places, SWAP: tl.constexpr
):
    """SwiGLU of a tile, quantised where there are scales to store."""
    hidden = gate * tl.sigmoid(gate) * up
    if SWAP:
        hidden = hidden.T
    if scale_ptr is not None:
        amax = tl.maximum(tl.max(tl.abs(hidden), 1), 1e-4)
        tl.store(scale_ptr + column_tile * num_places + place, amax / 448, mask=valid)
        hidden *= (448 / amax)[:, None]
    n = column_tile * hidden.shape[1] + tl.arange(0, hidden.shape[1])
    out_ptrs = out_ptr + place.to(tl.int64)[:, None] * width + n[None, :]
    within = valid[:, None] & (n < width)[None, :]
    tl.store(out_ptrs, hidden.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def _down_kernel(
    x_ptr,  # [R, I]
    x_scale_ptr,  # [R, I / 128] where SCALED
    w_ptr,  # [E, D, I]; where TMA a descriptor of [E * D, I]
    w_scale_ptr,  # [E, ceil(D / 128), I / 128] where SCALED
    out_ptr,  # [R, D]
    parts_ptr,  # [SPLITS, R, D] fp32: each split's sums; None of one
    counters_ptr,  # `tile_counters`; None of one split
    rows_ptr,  # [R] flat choices where SCATTER
    weights_ptr,  # [R] of flat choices, or None
    starts_ptr,  # [E]
    counts_ptr,  # [E]
    num_experts,
    num_places,
    width,  # D
    depth,  # I
    stride_xr,
    stride_xsr,
    stride_xsk,
    SCALED: tl.constexpr,
    SCATTER: tl.constexpr,
    EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    PAIR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    ROW_GROUP: tl.constexpr,
):
    TILES: tl.constexpr = 2 if PAIR else 1
    column_tiles = tl.cdiv(width, BLOCK_N * TILES)
    ends = _last_tiles(counts_ptr, num_experts, column_tiles, EXPERTS, BLOCK_M)
    steps = tl.cdiv(depth, BLOCK_K)
    share = tl.cdiv(steps, SPLITS)
    for item in range(tl.program_id(0), tl.max(ends, 0) * SPLITS, tl.num_programs(0)):
        split = item % SPLITS
        expert, row_tile, column_tile = _find_tile(
            item // SPLITS, ends, counts_ptr, column_tiles, BLOCK_M, ROW_GROUP
        )
        place = _places(starts_ptr, counts_ptr, expert, row_tile, BLOCK_M)
        first = column_tile * BLOCK_N * TILES
        n = first + tl.arange(0, BLOCK_N)
        n2 = n + BLOCK_N
        if TMA:
            w_rows = (expert * width + first).to(tl.int32)
            w2_rows = w_rows + BLOCK_N
        else:
            w_rows = w_ptr + (expert * width + tl.minimum(n, width - 1)) * depth
            w2_rows = w_ptr + (expert * width + tl.minimum(n2, width - 1)) * depth
        x_scales = x_ptr
        w_scales = x_ptr
        w2_scales = x_ptr
        if SCALED:
            x_scales = x_scale_ptr + place.to(tl.int64) * stride_xsr
            scale_tiles = tl.cdiv(width, BLOCK_K)
            w_scales = w_scale_ptr + (expert * scale_tiles + first // BLOCK_K) * steps
            second = tl.minimum((first + BLOCK_N) // BLOCK_K, scale_tiles - 1)
            w2_scales = w_scale_ptr + (expert * scale_tiles + second) * steps
        sums, sums2 = multiply(
            x_ptr + place.to(tl.int64) * stride_xr,
            x_scales,
            stride_xsk,
            w_ptr,
            w_rows,
            w_scales,
            w2_rows,
            w2_scales,
            depth,
            split * share,
            tl.minimum((split + 1) * share, steps),
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SCALED,
            PAIR=PAIR,
            SWAP=SWAP,
            TMA=TMA,
            EVEN_K=EVEN_K,
        )
        place, valid = _places_to_store(starts_ptr, counts_ptr, expert, row_tile, BLOCK_M)
        choice = place
        if SCATTER:
            choice = tl.load(rows_ptr + place, mask=valid, other=0)
        factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        if weights_ptr is not None:
            factor = tl.load(weights_ptr + choice, mask=valid, other=0.0)
        first_elements = choice.to(tl.int64) * width
        if SPLITS == 1:
            _store_tile(out_ptr + first_elements, sums, factor, n, valid, width, SWAP)
            if PAIR:
                _store_tile(out_ptr + first_elements, sums2, factor, n2, valid, width, SWAP)
        else:
            stride = tl.cast(num_places, tl.int64) * width
            parts = parts_ptr + first_elements
            _store_tile(parts + split * stride, sums, factor, n, valid, width, SWAP)
            if PAIR:
                _store_tile(parts + split * stride, sums2, factor, n2, valid, width, SWAP)
            if arrives_last(counters_ptr + item // SPLITS, SPLITS):
                _store_sum(first_elements, out_ptr, parts_ptr, stride, n, valid, width, SPLITS)
                if PAIR:
                    _store_sum(first_elements, out_ptr, parts_ptr, stride, n2, valid, width, SPLITS)


@triton.jit
def _store_tile(out_rows, sums, factor, n, valid, width, SWAP: tl.constexpr):
    if SWAP:
        sums = sums.T
    out_ptrs = out_rows[:, None] + n[None, :]
    within = valid[:, None] & (n < width)[None, :]
    weighted = sums * factor[:, None]
    tl.store(out_ptrs, weighted.to(out_rows.dtype.element_ty), mask=within)


@triton.jit
def _store_sum(first_elements, out_ptr, parts_ptr, stride, n, valid, width, SPLITS: tl.constexpr):
    within = valid[:, None] & (n < width)[None, :]
    elements = first_elements[:, None] + n[None, :]
    sums = sum_parts(parts_ptr, elements, stride, within, SPLITS)
    tl.store(out_ptr + elements, sums.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def _combine_kernel(
    routed_ptr,  # [T * TOP_K, D]
    shared_ptr,  # [T, D] or None
    residual_ptr,  # [T, D]
    out_ptr,  # [T, D]
    width,
    stride_rt,
    stride_st,
    stride_et,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = n < width
    routed_ptrs = routed_ptr + token * TOP_K * stride_rt + n
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for choice in tl.static_range(TOP_K):
        sums += tl.load(routed_ptrs + choice * stride_rt, mask=within, other=0.0).to(tl.float32)
    if shared_ptr is not None:
        sums += tl.load(shared_ptr + token * stride_st + n, mask=within, other=0.0).to(tl.float32)
    sums += tl.load(residual_ptr + token * stride_et + n, mask=within, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + n, sums.to(out_ptr.dtype.element_ty), mask=within)


def gate_up(
    x: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None,
    *,
    starts: Tensor,
    counts: Tensor,
    rows: Tensor | None,
    top_k: int,
    tile: Tile | None = None,
    values_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Tensor | Quantized:
    """`tidemill.kernels.grouped_gemm.gate_up`, with a tile of the caller's choice.

    values_dtype fp32 keeps quantised values as they are before they are rounded to e4m3.
    """
    values, scales = _parts(x)
    scaled = scales is not None
    num_places = len(values if rows is None else rows)
    num_experts, width, depth = weight.shape[0], weight.shape[1] // 2, weight.shape[2]
    out = weight.new_empty(num_places, width, dtype=values_dtype if scaled else values.dtype)
    out_scales = None
    if scaled:
        out_scales = starts.new_empty(width // 128, num_places, dtype=torch.float32).t()
    if tile is None:
        tile = tile_for(GATE_UP_TILES, values, num_experts, num_places, width)
    splits = splits_for(
        tile, num_experts, num_places, width=width, depth=depth, device=weight.device
    )
    items = column_tiles(tile, width) * splits
    parts, counters = scratch(splits, num_places, 2 * width, weight.device)
    _gate_up_kernel[_grid(tile, num_experts, num_places, items, weight.device)](
        values,
        scales,
        _weight_argument(tile, weight),
        scale_inv,
        out,
        out_scales,
        parts,
        counters,
        rows,
        starts,
        counts,
        num_experts,
        num_places,
        width,
        depth,
        top_k,
        values.stride(0),
        *((0, 0) if scales is None else scales.stride()),
        SCALED=scaled,
        GATHER=rows is not None,
        EXPERTS=experts_held(tile, num_experts),
        SPLITS=splits,
        **_blocks(tile, depth),
    )
    return out if out_scales is None else Quantized(out, out_scales)


def down(
    hidden: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None,
    *,
    starts: Tensor,
    counts: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """`tidemill.kernels.grouped_gemm.down`, with a tile of the caller's choice."""
    values, scales = _parts(hidden)
    num_places = len(values)
    num_experts, width, depth = weight.shape
    out = weight.new_empty(num_places, width, dtype=out_dtype)
    if tile is None:
        tile = tile_for(DOWN_TILES, values, num_experts, num_places, width)
    splits = splits_for(
        tile, num_experts, num_places, width=width, depth=depth, device=weight.device
    )
    items = column_tiles(tile, width) * splits
    parts, counters = scratch(splits, num_places, width, weight.device)
    _down_kernel[_grid(tile, num_experts, num_places, items, weight.device)](
        values,
        scales,
        _weight_argument(tile, weight),
        scale_inv,
        out,
        parts,
        counters,
        rows,
        weights,
        starts,
        counts,
        num_experts,
        num_places,
        width,
        depth,
        values.stride(0),
        *((0, 0) if scales is None else scales.stride()),
        SCALED=scales is not None,
        SCATTER=rows is not None,
        EXPERTS=experts_held(tile, num_experts),
        SPLITS=splits,
        PAIR=tile.pair,
        **_blocks(tile, depth),
    )
    return out


def combine(routed: Tensor, residual: Tensor, shared: Tensor | None) -> Tensor:
    """`tidemill.kernels.grouped_gemm.combine`."""
    num_tokens, width = residual.shape
    out = residual.new_empty(num_tokens, width)
    if num_tokens:
        _combine_kernel[num_tokens, triton.cdiv(width, _COMBINE_BLOCK)](
            routed,
            shared,
            residual,
            out,
            width,
            routed.stride(0),
            0 if shared is None else shared.stride(0),
            residual.stride(0),
            TOP_K=len(routed) // num_tokens,
            BLOCK_N=_COMBINE_BLOCK,
        )
    return out


def _parts(x: Tensor | Quantized) -> tuple[Tensor, Tensor | None]:
    return (x.values, x.scales) if isinstance(x, Quantized) else (x, None)


def _weight_argument(tile: Tile, weight: Tensor) -> Tensor | TensorDescriptor:
    if not tile.tma:
        return weight
    return TensorDescriptor.from_tensor(weight.flatten(0, 1), [tile.columns, tile.depth])


def _grid(
    tile: Tile, num_experts: int, num_places: int, items: int, device: torch.device
) -> tuple[int]:
    """Programs for `items` pieces of work a row tile: known here without asking the device."""
    most = most_row_tiles(tile, num_experts, num_places) * items
    return (max(1, min(most, tile.per_sm * num_sms(device))),)


def _blocks(tile: Tile, depth: int) -> dict[str, int | bool]:
    """What a tile is to a kernel."""
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "EVEN_K": depth % tile.depth == 0,
        "SWAP": tile.swap,
        "TMA": tile.tma,
        "ROW_GROUP": tile.row_group,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def variants() -> list[Variant]:
    """Every kernel at every tile of the tables, for DeepSeek-V3's 256 experts."""
    found = []
    for size, element in ((1, "*fp8e4nv"), (2, "*bf16")):
        for table, variant in ((GATE_UP_TILES, _gate_up_variant), (DOWN_TILES, _down_variant)):
            for tile in all_tiles(table[size]):
                counts = (1, 2, 8) if tile.splits == 0 else (tile.splits,)
                found += [variant(tile, element, splits=splits) for splits in counts]
    found.append(_gate_up_variant(GATE_UP_TILES[1][H100][-1][1], "*fp8e4nv", gather=False))
    found.append(
        Variant(
            _combine_kernel,
            {
                **dict.fromkeys(("routed_ptr", "shared_ptr", "residual_ptr", "out_ptr"), "*bf16"),
                **dict.fromkeys(("width", "stride_rt", "stride_st", "stride_et"), "i32"),
                **dict.fromkeys(("TOP_K", "BLOCK_N"), "constexpr"),
            },
            {"TOP_K": 8, "BLOCK_N": _COMBINE_BLOCK},
        )
    )
    return found


def _gate_up_variant(tile: Tile, element: str, *, splits: int = 1, gather: bool = True) -> Variant:
    flags = {"SCALED": element == "*fp8e4nv", "GATHER": gather, "SPLITS": splits}
    return _variant(_gate_up_kernel, tile, element, flags, {"rows_ptr": gather})


def _down_variant(tile: Tile, element: str, *, splits: int = 1) -> Variant:
    flags = {"SCALED": element == "*fp8e4nv", "SCATTER": True, "SPLITS": splits, "PAIR": tile.pair}
    return _variant(_down_kernel, tile, element, flags, {"rows_ptr": True, "weights_ptr": True})


def _variant(
    kernel: Any, tile: Tile, element: str, flags: dict[str, Any], given: dict[str, bool]
) -> Variant:
    blocks = _blocks(tile, depth=tile.depth)
    warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    scaled, split = flags["SCALED"], flags["SPLITS"] > 1
    given |= {"parts_ptr": split, "counters_ptr": split}
    given |= {"x_scale_ptr": scaled, "w_scale_ptr": scaled, "out_scale_ptr": scaled}
    experts = experts_held(tile, 256 if flags.get("GATHER", True) else 1)
    constants: dict[str, Any] = {**flags, "EXPERTS": experts, **blocks}
    types = {"x_ptr": element, "w_ptr": element, "weights_ptr": "*fp32"}
    types |= dict.fromkeys(("x_scale_ptr", "w_scale_ptr", "out_scale_ptr", "parts_ptr"), "*fp32")
    types |= dict.fromkeys(("rows_ptr", "starts_ptr", "counts_ptr", "counters_ptr"), "*i32")
    types["out_ptr"] = element if kernel is _gate_up_kernel else "*bf16"
    if tile.tma:
        types["w_ptr"] = f"tensordesc<{element[1:]}[{tile.columns}, {tile.depth}]>"
    constants |= {name: None for name in kernel.arg_names if not given.get(name, True)}
    constants |= {name: 1 for name in kernel.arg_names if name in ("stride_xst", "stride_xsr")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    aligned += [name for name in ("width", "depth", "stride_xt", "stride_xr") if name in signature]
    return Variant(kernel, signature, constants, warps, stages, tuple(aligned), matrix=True)
