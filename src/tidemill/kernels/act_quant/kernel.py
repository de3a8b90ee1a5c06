"""FP8 activations on a GPU: one pass, 16 bytes a thread and access.

T rows, D values of a row, G = D / 128 groups. A program has one group's column of a tile of rows,
so that the tile's scales lie together where they are stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidemill.kernels.act_quant.reference import GROUP, LARGEST, SMALLEST_AMAX, Quantized
from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GROUP = tl.constexpr(GROUP)
_LARGEST = tl.constexpr(LARGEST)
_SMALLEST_AMAX = tl.constexpr(SMALLEST_AMAX)
# Rows of a tile and its warps, for few rows and for many. Untimed.
_FEW, _MANY = (8, 1), (32, 4)
_MANY_ROWS = 256


@triton.jit
def quantize_groups(x):
    """fp32 [N, 128] -> the same over its row's scale, not yet rounded, and the scales [N]."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), _SMALLEST_AMAX)
    return x * tl.div_rn(_LARGEST, amax)[:, None], tl.div_rn(amax, _LARGEST)


@triton.jit(do_not_specialize=["num_rows"])
def _act_quant_kernel(
    x_ptr,  # [T, D], or gate over up [T, 2 * D] where GATED
    values_ptr,  # [T, D]
    scales_ptr,  # [G, T]
    num_rows,
    num_groups,
    stride_xt,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % num_groups
    rows = (program // num_groups).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = group * _GROUP + tl.arange(0, _GROUP)
    inside = rows < num_rows
    dim = num_groups * _GROUP

    at = x_ptr + rows[:, None] * stride_xt + columns[None, :]
    x = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(at + dim, mask=inside[:, None], other=0.0).to(tl.float32)
        x = (x * tl.sigmoid(x) * up).to(x_ptr.dtype.element_ty).to(tl.float32)
    scaled, scales = quantize_groups(x)
    to = values_ptr + rows[:, None] * dim + columns[None, :]
    tl.store(to, scaled.to(values_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(scales_ptr + group.to(tl.int64) * num_rows + rows, scales, mask=inside)


def act_quant(x: Tensor, values_dtype: torch.dtype = torch.float8_e4m3fn) -> Quantized:
    """The reference's `act_quant`; another `values_dtype` leaves the values as they were scaled."""
    return _launch("act_quant", x, values_dtype, gated=False)


def swiglu_quant(gate_up: Tensor, values_dtype: torch.dtype = torch.float8_e4m3fn) -> Quantized:
    """The reference's `swiglu_quant`; `values_dtype` as in `act_quant`."""
    return _launch("swiglu_quant", gate_up, values_dtype, gated=True)


def empty_quantized(like: Tensor, num_rows: int, dim: int, values_dtype: torch.dtype) -> Quantized:
    """Memory for [num_rows, dim] quantised values on the device of `like`."""
    values = torch.empty((num_rows, dim), dtype=values_dtype, device=like.device)
    scales = torch.empty((dim // GROUP, num_rows), dtype=torch.float32, device=like.device)
    return Quantized(values, scales.t())


def _launch(op: str, x: Tensor, values_dtype: torch.dtype, *, gated: bool) -> Quantized:
    arguments = Arguments(op)
    arguments.take("gate_up" if gated else "x", x, "T D", *FLOATS)
    num_rows, dim = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    arguments.require(
        x.shape[1] % (2 * GROUP if gated else GROUP) == 0,
        f"D must be a multiple of {2 * GROUP if gated else GROUP}",
    )
    out = empty_quantized(x, num_rows, dim, values_dtype)
    if out.values.numel() == 0:
        return out
    block, warps = _MANY if num_rows >= _MANY_ROWS else _FEW
    num_groups = dim // GROUP
    _act_quant_kernel[(triton.cdiv(num_rows, block) * num_groups,)](
        x,
        out.values,
        out.scales,
        num_rows,
        num_groups,
        x.stride(0),
        GATED=gated,
        BLOCK_T=block,
        num_warps=warps,
    )
    return out


def variants() -> list[Variant]:
    """Every configuration that is launched on bf16 rows."""
    return [
        Variant(
            _act_quant_kernel,
            signature={
                "x_ptr": "*bf16",
                "values_ptr": "*fp8e4nv",
                "scales_ptr": "*fp32",
                "num_rows": "i32",
                "num_groups": "i32",
                "stride_xt": "i32",
                "GATED": "constexpr",
                "BLOCK_T": "constexpr",
            },
            constants={"GATED": gated, "BLOCK_T": block},
            num_warps=warps,
            aligned=("x_ptr", "values_ptr", "scales_ptr", "stride_xt"),
        )
        for gated in (False, True)
        for block, warps in (_FEW, _MANY)
    ]
