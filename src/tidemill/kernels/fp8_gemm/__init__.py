"""Dense product of block-scaled FP8 activations and weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from tidemill.kernels.act_quant import Quantized
from tidemill.kernels.check import Arguments
from tidemill.kernels.choice import takes_triton
from tidemill.kernels.fp8_gemm import reference

__all__ = ["fp8_gemm"]


def fp8_gemm(
    a: Quantized,
    weight: Tensor,
    scale_inv: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """a [T, K], weight [N, K] e4m3, scale_inv [ceil(N/128), K/128] fp32 -> [T, N] in out_dtype.

    `residual` [T, N] and `bias` [N] are added in fp32, before the one rounding. ValueError where
    K is no multiple of 128 or a tensor is not as described.
    """
    args = Arguments("fp8_gemm")
    args.take("a.values", a.values, "T K", torch.float8_e4m3fn)
    args.take("weight", weight, "N K", torch.float8_e4m3fn)
    args.require(weight.is_contiguous(), "weight must be contiguous")
    args.require(args.sizes["K"] % 128 == 0, "K must be a multiple of 128")
    args.sizes["K/128"] = args.sizes["K"] // 128
    args.sizes["N/128"] = -(-args.sizes["N"] // 128)
    args.take("a.scales", a.scales, "T K/128", torch.float32, strided=True)
    args.take("scale_inv", scale_inv, "N/128 K/128", torch.float32)
    args.require(scale_inv.is_contiguous(), "scale_inv must be contiguous")
    if residual is not None:
        args.take("residual", residual, "T N")
    if bias is not None:
        args.take("bias", bias, "N")
    run: Callable[..., Tensor] = reference.fp8_gemm
    if takes_triton(weight):
        from tidemill.kernels.fp8_gemm import kernel

        run = kernel.fp8_gemm
    return run(a, weight, scale_inv, out_dtype=out_dtype, residual=residual, bias=bias)
