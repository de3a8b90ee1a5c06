"""RMSNorm on a GPU, with the sum before it and the quantisation after it: rows are read once.

T rows, D values of a row, G = D / 128 groups. A program has one row, in registers, as [G, 128]: the
groups' scales are then reductions within a warp. 7168 is 7 of the 8 times that its threads go round
(four warps of 8 values each): the mask of the last is known when compiling.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tidemill.kernels.act_quant.kernel import FLOATS, empty_quantized, quantize_groups
from tidemill.kernels.act_quant.reference import GROUP, Quantized
from tidemill.kernels.aot import Variant
from tidemill.kernels.check import Arguments

_GROUP = tl.constexpr(GROUP)
_WARP_VALUES = 2048  # of a row for each warp: eight loads of 16 bytes a thread in bf16. Untimed.


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D] where ADDS
    weight_ptr,  # [D]
    sum_ptr,  # [T, D] where ADDS
    normed_ptr,  # [T, D] where KEEPS
    values_ptr,  # [T, D] where QUANTIZES
    scales_ptr,  # [G, T] where QUANTIZES
    num_rows,
    stride_xt,
    stride_rt,
    eps,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ADDS: tl.constexpr,
    KEEPS: tl.constexpr,
    QUANTIZES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_G)
    columns = groups[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    inside = columns < D

    x = tl.load(x_ptr + row * stride_xt + columns, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        residual = tl.load(residual_ptr + row * stride_rt + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * D + columns, x, mask=inside)
    wide = x.to(tl.float32)
    square = tl.sum(wide * wide)
    normed = (wide * tl.rsqrt(square / D + eps) * weight).to(x_ptr.dtype.element_ty)
    if KEEPS:
        tl.store(normed_ptr + row * D + columns, normed, mask=inside)
    if QUANTIZES:
        scaled, scales = quantize_groups(normed.to(tl.float32))
        values = scaled.to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row * D + columns, values, mask=inside)
        to = scales_ptr + groups.to(tl.int64) * num_rows + row
        tl.store(to, scales, mask=groups * _GROUP < D)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference's `rms_norm`."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch("rms_norm", rows, weight, eps, normed=normed)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The reference's `add_rms_norm`."""
    normed, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch("add_rms_norm", x, weight, eps, residual=residual, total=total, normed=normed)
    return normed, total


def rms_norm_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    keep: bool = True,
    values_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Tensor | None, Quantized]:
    """The reference's `rms_norm_quant`, its first None without `keep`.

    Another `values_dtype` leaves the values as they were scaled.
    """
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device) if keep else None
    quantized = empty_quantized(x, x.shape[0], x.shape[1], values_dtype)
    _launch("rms_norm_quant", x, weight, eps, normed=normed, quantized=quantized)
    return normed, quantized


def add_rms_norm_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    values_dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[Quantized, Tensor]:
    """The reference's `add_rms_norm_quant`; `values_dtype` as in `rms_norm_quant`."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    quantized = empty_quantized(x, x.shape[0], x.shape[1], values_dtype)
    _launch(
        "add_rms_norm_quant", x, weight, eps, residual=residual, total=total, quantized=quantized
    )
    return quantized, total


def _launch(
    op: str,
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    normed: Tensor | None = None,
    quantized: Quantized | None = None,
) -> None:
    arguments = Arguments(op)
    arguments.take("x", x, "T D", *FLOATS)
    arguments.take("weight", weight, "D", *FLOATS)
    if residual is not None:
        arguments.take("residual", residual, "T D", x.dtype)
    num_rows, dim = x.shape
    if quantized is not None:
        arguments.require(dim % GROUP == 0, f"D must be a multiple of {GROUP}")
    if x.numel() == 0:
        return
    block, warps = tiles(dim)
    _rms_norm_kernel[(num_rows,)](
        x,
        x if residual is None else residual,  # where a flag is off its pointer is not looked at
        weight,
        x if total is None else total,
        x if normed is None else normed,
        x if quantized is None else quantized.values,
        x if quantized is None else quantized.scales,
        num_rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        D=dim,
        BLOCK_G=block,
        ADDS=residual is not None,
        KEEPS=normed is not None,
        QUANTIZES=quantized is not None,
        num_warps=warps,
    )


def tiles(dim: int) -> tuple[int, int]:
    """Groups of 128, up to a power of two, and warps for a row of `dim` values."""
    block: int = triton.next_power_of_2(triton.cdiv(dim, GROUP))
    return block, min(16, max(1, block * GROUP // _WARP_VALUES))


def variants() -> list[Variant]:
    """Every use at DeepSeek-V3's widths, on bf16 rows."""
    uses = [  # width, ADDS, KEEPS, QUANTIZES
        (7168, False, True, False),
        (7168, True, True, False),
        (7168, False, False, True),
        (7168, False, True, True),
        (7168, True, False, True),
        (1536, False, True, False),
        (1536, False, False, True),
        (512, False, True, False),
    ]
    return [_variant(*use) for use in uses]


def _variant(dim: int, adds: bool, keeps: bool, quantizes: bool) -> Variant:
    block, warps = tiles(dim)
    return Variant(
        _rms_norm_kernel,
        signature={
            "x_ptr": "*bf16",
            "residual_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "sum_ptr": "*bf16",
            "normed_ptr": "*bf16",
            "values_ptr": "*fp8e4nv",
            "scales_ptr": "*fp32",
            "num_rows": "i32",
            "stride_xt": "i32",
            "stride_rt": "i32",
            "eps": "fp32",
            "D": "constexpr",
            "BLOCK_G": "constexpr",
            "ADDS": "constexpr",
            "KEEPS": "constexpr",
            "QUANTIZES": "constexpr",
        },
        constants={
            "D": dim,
            "BLOCK_G": block,
            "ADDS": adds,
            "KEEPS": keeps,
            "QUANTIZES": quantizes,
        },
        num_warps=warps,
        aligned=(
            "x_ptr",
            "residual_ptr",
            "weight_ptr",
            "sum_ptr",
            "normed_ptr",
            "values_ptr",
            "scales_ptr",
            "stride_xt",
            "stride_rt",
        ),
    )
