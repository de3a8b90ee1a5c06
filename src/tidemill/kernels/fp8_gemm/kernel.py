"""Dense block-scaled FP8 product in Triton; its inner loop also serves the experts' products.

M rows of activations, N columns (rows of the weight), K deep. An e4m3 activation has a scale for
each 128 of K, a weight for each 128 x 128. A program computes BLOCK_M rows by one or two weight
tiles of BLOCK_N columns, which lie in one row of weight scales each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tidemill.kernels.act_quant import Quantized
from tidemill.kernels.aot import Variant
from tidemill.kernels.device import H100, device_class, num_sms
from tidemill.kernels.fp8_gemm.configs import TILES, Tile, count_splits
from tidemill.kernels.tiles import all_tiles, choose_tile

_SUM_BLOCK = 1024


@triton.jit
def multiply(
    x_rows,  # [BLOCK_M] pointers to each row's first element
    x_scales,  # [BLOCK_M] pointers to each row's first scale
    stride_xs,  # from one scale of a row to the next
    w,  # descriptor of the whole weight where TMA
    w_rows,  # [BLOCK_N] pointers to each column's first element; where TMA the first one's index
    w_scales,  # pointer to the tile's first scale
    w2_rows,  # the second tile, where PAIR
    w2_scales,
    depth,  # K
    first,  # steps of BLOCK_K [first, last)
    last,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,  # e4m3 with scales: BLOCK_K is 128
    PAIR: tl.constexpr,
    SWAP: tl.constexpr,  # weights are the left operand: few rows still fill its 64 rows
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """fp32 x @ w.T of one or two tiles, [BLOCK_N, BLOCK_M] if SWAP, else [BLOCK_M, BLOCK_N].

    The tensor cores add 128 products in fewer bits than fp32 has; each such sum is scaled and
    added in fp32.
    """
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums2 = sums
    # A step ahead: a scale is then there when its product is. Where two products of 128 rows leave
    # no registers for that, the first of them takes longer than a load does.
    AHEAD: tl.constexpr = SCALED and not (PAIR and BLOCK_M >= 128)
    if AHEAD:
        start = tl.minimum(first, last - 1)  # a split may have no step
        scales = tl.load(x_scales + start * stride_xs)
        w_scale = tl.load(w_scales + start)
        w2_scale = tl.load(w2_scales + start)
    for step in range(first, last):
        x = _load_step(x_rows, step, depth, BLOCK_K, EVEN_K)
        if TMA:
            weights = w.load([w_rows, step * BLOCK_K])
        else:
            weights = _load_step(w_rows, step, depth, BLOCK_K, EVEN_K)
        if PAIR:
            if TMA:
                weights2 = w.load([w2_rows, step * BLOCK_K])
            else:
                weights2 = _load_step(w2_rows, step, depth, BLOCK_K, EVEN_K)
        if SCALED:
            if AHEAD:
                step_scales, step_w_scale, step_w2_scale = scales, w_scale, w2_scale
                ahead = tl.minimum(step + 1, last - 1)
                scales = tl.load(x_scales + ahead * stride_xs)
                w_scale = tl.load(w_scales + ahead)
                w2_scale = tl.load(w2_scales + ahead)
            else:
                step_scales = tl.load(x_scales + step * stride_xs)
                step_w_scale = tl.load(w_scales + step)
                step_w2_scale = tl.load(w2_scales + step)
            sums += _scaled(x, weights, step_scales * step_w_scale, SWAP)
            if PAIR:
                sums2 += _scaled(x, weights2, step_scales * step_w2_scale, SWAP)
        elif SWAP:
            sums = tl.dot(weights, x.T, sums, input_precision="ieee")
            if PAIR:
                sums2 = tl.dot(weights2, x.T, sums2, input_precision="ieee")
        else:
            sums = tl.dot(x, weights.T, sums, input_precision="ieee")
            if PAIR:
                sums2 = tl.dot(x, weights2.T, sums2, input_precision="ieee")
    return sums, sums2


@triton.jit
def _load_step(rows, step, depth, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    k = step * BLOCK_K + tl.arange(0, BLOCK_K)
    if EVEN_K:
        elements = tl.load(rows[:, None] + k[None, :])
    else:
        elements = tl.load(rows[:, None] + k[None, :], mask=k[None, :] < depth, other=0.0)
    return elements


@triton.jit
def _scaled(x, w, row_scales, SWAP: tl.constexpr):
    if SWAP:
        products = tl.dot(w, x.T) * row_scales[None, :]
    else:
        products = tl.dot(x, w.T) * row_scales[:, None]
    return products


@triton.jit
def place_in_group(tile, num_row_tiles, num_column_tiles, ROW_GROUP: tl.constexpr):
    """Row and column tile of a linear index: within ROW_GROUP row tiles, column after column.

    Programs that run together then share a few weight tiles and a few of activations.
    """
    per_group = ROW_GROUP * num_column_tiles
    first_row = tile // per_group * ROW_GROUP
    height = tl.minimum(num_row_tiles - first_row, ROW_GROUP)
    within = tile % per_group
    return first_row + within % height, within // height


@triton.jit
def _fp8_gemm_kernel(
    x_ptr,  # [M, K] e4m3
    x_scale_ptr,  # [M, K / 128]
    w_ptr,  # [N, K] e4m3, a descriptor where TMA
    w_scale_ptr,  # [ceil(N / 128), K / 128]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [splits, M, N]: of one split the result, else each split's sum
    num_rows,
    num_columns,
    depth,
    stride_xm,
    stride_xsm,
    stride_xsk,
    stride_rm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    ROW_GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    row_tile, column_tile = place_in_group(tl.program_id(0), row_tiles, column_tiles, ROW_GROUP)
    split = tl.program_id(1)
    steps = tl.cdiv(depth, BLOCK_K)
    share = tl.cdiv(steps, tl.num_programs(1))
    # Tails read the last row again: loads need no mask, only the store does.
    m = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (column_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row = tl.minimum(m, num_rows - 1)
    if TMA:
        w_rows = column_tile * BLOCK_N
    else:
        w_rows = w_ptr + tl.minimum(n, num_columns - 1) * depth
    w_scales = w_scale_ptr + column_tile * BLOCK_N // BLOCK_K * steps
    sums, _ = multiply(
        x_ptr + row * stride_xm,
        x_scale_ptr + row * stride_xsm,
        stride_xsk,
        w_ptr,
        w_rows,
        w_scales,
        w_rows,
        w_scales,
        depth,
        split * share,
        tl.minimum((split + 1) * share, steps),
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SCALED=True,
        PAIR=False,
        SWAP=SWAP,
        TMA=TMA,
        EVEN_K=True,
    )
    if SWAP:
        sums = sums.T
    within = (m < num_rows)[:, None] & (n < num_columns)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < num_columns, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + m[:, None] * stride_rm + n[None, :]
        sums += tl.load(residual_ptrs, mask=within, other=0.0).to(tl.float32)
    out_row = split.to(tl.int64) * num_rows + m
    out_ptrs = out_ptr + out_row[:, None] * num_columns + n[None, :]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=within)


@triton.jit
def _sum_splits_kernel(
    parts_ptr,  # [SPLITS, M, N] fp32
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N]
    num_columns,
    stride_part,
    stride_rm,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = n < num_columns
    part_ptrs = parts_ptr + row * num_columns + n
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(part_ptrs + split * stride_part, mask=within, other=0.0)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=within, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * stride_rm + n
        sums += tl.load(residual_ptrs, mask=within, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + row * num_columns + n
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=within)


def fp8_gemm(
    a: Quantized,
    weight: Tensor,
    scale_inv: Tensor,
    *,
    out_dtype: torch.dtype,
    residual: Tensor | None,
    bias: Tensor | None,
    tile: Tile | None = None,
) -> Tensor:
    """`tidemill.kernels.fp8_gemm.fp8_gemm`, with a tile of the caller's choice."""
    num_rows, depth = a.values.shape
    num_columns = weight.shape[0]
    out = weight.new_empty(num_rows, num_columns, dtype=out_dtype)
    if num_rows == 0:
        return out
    if tile is None:
        tile = choose_tile(TILES, device_class(weight.device), num_rows)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns)
    splits = count_splits(tile, num_tiles, depth // tile.depth, num_sms(weight.device))
    parts = out if splits == 1 else out.new_empty(splits, *out.shape, dtype=torch.float32)
    extra = (bias, residual) if splits == 1 else (None, None)
    _fp8_gemm_kernel[num_tiles, splits](
        a.values,
        a.scales,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if tile.tma else weight,
        scale_inv,
        *extra,
        parts,
        num_rows,
        num_columns,
        depth,
        a.values.stride(0),
        *a.scales.stride(),
        0 if residual is None else residual.stride(0),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        SWAP=tile.swap,
        TMA=tile.tma,
        ROW_GROUP=tile.row_group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        sum_splits(parts, out, bias, residual)
    return out


def sum_splits(parts: Tensor, out: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """parts [S, M, N] fp32, plus bias [N], plus residual [M, N] -> out [M, N]: in that order."""
    splits, num_rows, num_columns = parts.shape
    _sum_splits_kernel[num_rows, triton.cdiv(num_columns, _SUM_BLOCK)](
        parts,
        bias,
        residual,
        out,
        num_columns,
        parts.stride(0),
        0 if residual is None else residual.stride(0),
        SPLITS=splits,
        BLOCK_N=_SUM_BLOCK,
    )


def variants() -> list[Variant]:
    """Every kernel at every tile of the table, with and without what may be added."""
    found = [_variant(tile, split=tile.splits != 1) for tile in all_tiles(TILES)]
    found.append(_variant(TILES[H100][0][1], split=False))
    names = ("num_columns", "stride_part", "stride_rm")
    pointers = dict.fromkeys(("bias_ptr", "residual_ptr", "out_ptr"), "*bf16")
    constants = {"SPLITS": 4, "BLOCK_N": _SUM_BLOCK}
    types = {"parts_ptr": "*fp32", **pointers, **dict.fromkeys(names, "i32")}
    found.append(
        Variant(_sum_splits_kernel, {**types, **dict.fromkeys(constants, "constexpr")}, constants)
    )
    return found


def _variant(tile: Tile, *, split: bool) -> Variant:
    constants: dict[str, Any] = {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "SWAP": tile.swap,
        "TMA": tile.tma,
        "ROW_GROUP": tile.row_group,
        "stride_xsm": 1,
    }
    if split:
        constants |= {"bias_ptr": None, "residual_ptr": None}
    weight = f"tensordesc<fp8e4nv[{tile.columns}, {tile.depth}]>" if tile.tma else "*fp8e4nv"
    types = {"x_ptr": "*fp8e4nv", "w_ptr": weight, "x_scale_ptr": "*fp32", "w_scale_ptr": "*fp32"}
    types |= dict.fromkeys(("bias_ptr", "residual_ptr"), "*bf16")
    types["out_ptr"] = "*fp32" if split else "*bf16"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in _fp8_gemm_kernel.arg_names
    }
    aligned = [name for name, kind in signature.items() if kind.startswith("*")]
    aligned += ["num_columns", "depth", "stride_xm"]
    return Variant(
        _fp8_gemm_kernel,
        signature,
        constants,
        tile.warps,
        tile.stages,
        tuple(aligned),
        matrix=True,
    )
