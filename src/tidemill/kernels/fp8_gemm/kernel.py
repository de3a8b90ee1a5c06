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
from tidemill.kernels.device import device_class, num_sms, tile_counters
from tidemill.kernels.fp8_gemm.configs import TILES, Tile, count_splits
from tidemill.kernels.tiles import all_tiles, choose_tile


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
def arrives_last(counter, SPLITS: tl.constexpr):
    """Whether this program's part of a tile, stored before the call, is the last of SPLITS.

    The others' parts may then be read, past this multiprocessor's own cache (`sum_parts`). The
    counter is 0 again: the next launch, a graph's replay too, finds it so.
    """
    tl.debug_barrier()  # the one thread that counts speaks for all that have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def sum_parts(parts_ptr, elements, stride, within, SPLITS: tl.constexpr):
    """fp32 sum of a tile's `elements` in each of SPLITS parts, in order, whoever came last."""
    # Loads on their way take registers: those of one large part, or of a few small ones.
    AT_ONCE: tl.constexpr = max(1, 8192 // (within.shape[0] * within.shape[1]))
    sums = tl.zeros(within.shape, tl.float32)
    for _ in tl.range(SPLITS, loop_unroll_factor=AT_ONCE):
        sums += tl.load(parts_ptr + elements, mask=within, other=0.0, cache_modifier=".cg")
        parts_ptr += stride
    return sums


@triton.jit
def _fp8_gemm_kernel(
    x_ptr,  # [M, K] e4m3
    x_scale_ptr,  # [M, K / 128]
    w_ptr,  # [N, K] e4m3, a descriptor where TMA
    w_scale_ptr,  # [ceil(N / 128), K / 128]
    bias_ptr,  # [N] or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N]
    parts_ptr,  # [SPLITS, M, N] fp32: each split's sum; None of one
    counters_ptr,  # `tile_counters`; None of one split
    num_rows,
    num_columns,
    depth,
    stride_xm,
    stride_xsm,
    stride_xsk,
    stride_rm,
    SPLITS: tl.constexpr,
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
    share = tl.cdiv(steps, SPLITS)
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
    if SPLITS > 1:
        stride = tl.cast(num_rows, tl.int64) * num_columns
        elements = m[:, None] * num_columns + n[None, :]
        tl.store(parts_ptr + split * stride + elements, sums, mask=within)
        if not arrives_last(counters_ptr + tl.program_id(0), SPLITS):
            return
        sums = sum_parts(parts_ptr, elements, stride, within, SPLITS)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < num_columns, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + m[:, None] * stride_rm + n[None, :]
        sums += tl.load(residual_ptrs, mask=within, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + m[:, None] * num_columns + n[None, :]
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
    parts, counters = scratch(splits, num_rows, num_columns, weight.device)
    _fp8_gemm_kernel[num_tiles, splits](
        a.values,
        a.scales,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if tile.tma else weight,
        scale_inv,
        bias,
        residual,
        out,
        parts,
        counters,
        num_rows,
        num_columns,
        depth,
        a.values.stride(0),
        *a.scales.stride(),
        0 if residual is None else residual.stride(0),
        SPLITS=splits,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        SWAP=tile.swap,
        TMA=tile.tma,
        ROW_GROUP=tile.row_group,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def scratch(
    splits: int, num_rows: int, num_columns: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """What splits meet in: their sums and the tiles' counters; one split needs neither."""
    if splits == 1:
        return None, None
    parts = torch.empty(splits, num_rows, num_columns, dtype=torch.float32, device=device)
    return parts, tile_counters(device)


def variants() -> list[Variant]:
    """Every kernel at every tile of the table, with all that may be added."""
    found = []
    for tile in all_tiles(TILES):
        found += [_variant(tile, splits) for splits in ((1, 2, 8) if tile.splits != 1 else (1,))]
    return found


def _variant(tile: Tile, splits: int) -> Variant:
    constants: dict[str, Any] = {
        "SPLITS": splits,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "SWAP": tile.swap,
        "TMA": tile.tma,
        "ROW_GROUP": tile.row_group,
        "stride_xsm": 1,
    }
    if splits == 1:
        constants |= {"parts_ptr": None, "counters_ptr": None}
    weight = f"tensordesc<fp8e4nv[{tile.columns}, {tile.depth}]>" if tile.tma else "*fp8e4nv"
    types = {"x_ptr": "*fp8e4nv", "w_ptr": weight, "counters_ptr": "*i32"}
    types |= dict.fromkeys(("x_scale_ptr", "w_scale_ptr", "parts_ptr"), "*fp32")
    types |= dict.fromkeys(("bias_ptr", "residual_ptr", "out_ptr"), "*bf16")
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
