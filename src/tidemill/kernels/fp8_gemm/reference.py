"""Block-scaled product in plain torch: fp32 products of what the scaled values stand for."""

import torch
from torch import Tensor

from tidemill.kernels.act_quant.reference import Quantized, dequantize

GROUP = 128  # elements that share a scale, in each direction of a weight


def widen_weight(weight: Tensor, scale_inv: Tensor) -> Tensor:
    """weight [..., N, K] e4m3, scale_inv [..., ceil(N/128), ceil(K/128)] -> [..., N, K] fp32."""
    num_rows, num_columns = weight.shape[-2:]
    scales = scale_inv.repeat_interleave(GROUP, -2)[..., :num_rows, :]
    return weight.float() * scales.repeat_interleave(GROUP, -1)[..., :num_columns]


def fp8_gemm(
    a: Quantized,
    weight: Tensor,
    scale_inv: Tensor,
    *,
    out_dtype: torch.dtype,
    residual: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """`tidemill.kernels.fp8_gemm.fp8_gemm`."""
    out = dequantize(a, torch.float32) @ widen_weight(weight, scale_inv).T
    if bias is not None:
        out += bias
    if residual is not None:
        out += residual
    return out.to(out_dtype)
