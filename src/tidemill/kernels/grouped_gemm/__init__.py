"""Products of a mixture of experts: each expert's weight with the rows that chose it.

T tokens choose K of E experts each; a flat choice is t * K + k. Rows lie sorted by expert: expert
e has `counts[e]` of the R places from `starts[e]` on, all of it on the device. Sorted choices lie
without gaps (R = T * K); the masked layout gives each expert the same room (starts[e] = e * R / E).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tidemill.kernels.act_quant import Quantized
from tidemill.kernels.check import Arguments
from tidemill.kernels.choice import takes_triton
from tidemill.kernels.grouped_gemm import reference

__all__ = ["combine", "down", "gate_up"]

_FP8 = torch.float8_e4m3fn
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)


def gate_up(
    x: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    starts: Tensor,
    counts: Tensor,
    rows: Tensor | None = None,
    top_k: int = 1,
) -> Tensor | Quantized:
    """silu(x @ gate.T) * (x @ up.T) of each place [R, I], in x's dtype or quantised as x is.

    x [T, D]; weight [E, 2 * I, D], gate over up, in x's dtype, or e4m3 with scale_inv
    [E, 2 * I / 128, D / 128]; starts, counts [E] int32. With `rows` [R] int32, the flat choices in
    their sorted places, place p reads token rows[p] // top_k; without, row p of x. Places that no
    expert has stay unwritten. ValueError where a tensor is not as described, or D or I of FP8 is no
    multiple of 128.
    """
    args = Arguments("gate_up")
    _take_product(args, x, weight, scale_inv, dims=("T D", "E 2I D"))
    args.require(args.sizes["2I"] % (2 if scale_inv is None else 256) == 0, "2I is odd")
    if rows is None:
        args.sizes["R"] = args.sizes["T"]
    _take_places(args, starts, counts, rows)
    run: Callable[..., Tensor | Quantized] = reference.gate_up
    if takes_triton(weight):
        from tidemill.kernels.grouped_gemm import kernel

        run = kernel.gate_up
    return run(x, weight, scale_inv, starts=starts, counts=counts, rows=rows, top_k=top_k)


def down(
    hidden: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None = None,
    *,
    starts: Tensor,
    counts: Tensor,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """hidden @ weight.T of each place [R, D], in out_dtype (hidden's; bf16 where it is quantised).

    hidden [R, I]; weight [E, D, I], in hidden's dtype, or e4m3 with scale_inv
    [E, ceil(D / 128), I / 128]. With `rows` [R] int32 place p goes to row rows[p], times
    `weights` [T, K] fp32 of that flat choice if given; without, to row p. Rows that no place goes
    to stay unwritten. ValueError as in `gate_up`.
    """
    args = Arguments("down")
    _take_product(args, hidden, weight, scale_inv, dims=("R I", "E D I"))
    _take_places(args, starts, counts, rows)
    if weights is not None:
        args.require(rows is not None, "weights are those of flat choices, which rows must name")
        args.take("weights", weights, "T K", torch.float32)
        args.require(weights.numel() == args.sizes["R"], "weights must be R in all")
        args.require(weights.is_contiguous(), "weights must be contiguous")
    if out_dtype is None:
        out_dtype = torch.bfloat16 if isinstance(hidden, Quantized) else hidden.dtype
    run: Callable[..., Tensor] = reference.down
    if takes_triton(weight):
        from tidemill.kernels.grouped_gemm import kernel

        run = kernel.down
    return run(
        hidden,
        weight,
        scale_inv,
        starts=starts,
        counts=counts,
        rows=rows,
        weights=weights,
        out_dtype=out_dtype,
    )


def combine(routed: Tensor, residual: Tensor, shared: Tensor | None = None) -> Tensor:
    """residual [T, D] plus the sum of each token's K rows of routed [T * K, D] plus shared [T, D].

    Added in fp32, choice by choice, then shared, then residual, and rounded once: what a token
    gets does not depend on its batch.
    """
    args = Arguments("combine")
    args.take("residual", residual, "T D", *_PLAIN)
    args.take("routed", routed, "T*K D", *_PLAIN)
    args.require(args.sizes["T*K"] % max(args.sizes["T"], 1) == 0, "rows must be K a token")
    if shared is not None:
        args.take("shared", shared, "T D", *_PLAIN)
    if takes_triton(routed):
        from tidemill.kernels.grouped_gemm import kernel

        return kernel.combine(routed, residual, shared)
    return reference.combine(routed, residual, shared)


def _take_product(
    args: Arguments,
    x: Tensor | Quantized,
    weight: Tensor,
    scale_inv: Tensor | None,
    *,
    dims: tuple[str, str],
) -> None:
    """Check both sides of a product, and that FP8 comes with scales for both or for neither."""
    x_dims, weight_dims = dims
    args.require(
        isinstance(x, Quantized) == (scale_inv is not None),
        "FP8 needs a quantised left side and scale_inv, other types neither",
    )
    if not isinstance(x, Quantized) or scale_inv is None:
        assert isinstance(x, Tensor)
        args.take("x", x, x_dims, *_PLAIN)
        args.take("weight", weight, weight_dims, x.dtype)
    else:
        num_rows, depth = x_dims.split()
        args.take("x.values", x.values, x_dims, _FP8)
        args.take("weight", weight, weight_dims, _FP8)
        args.require(args.sizes[depth] % 128 == 0, f"{depth} must be a multiple of 128")
        args.sizes["K/128"] = args.sizes[depth] // 128
        args.sizes["N/128"] = -(-weight.shape[1] // 128)
        args.take("x.scales", x.scales, f"{num_rows} K/128", torch.float32, strided=True)
        args.take("scale_inv", scale_inv, "E N/128 K/128", torch.float32)
        args.require(scale_inv.is_contiguous(), "scale_inv must be contiguous")
    args.require(weight.is_contiguous(), "weight must be contiguous")


def _take_places(args: Arguments, starts: Tensor, counts: Tensor, rows: Tensor | None) -> None:
    args.take("starts", starts, "E", torch.int32)
    args.take("counts", counts, "E", torch.int32)
    if rows is not None:
        args.take("rows", rows, "R", torch.int32)
