"""RMSNorm in plain torch."""

import torch
from torch import Tensor

from tidemill.kernels.act_quant.reference import Quantized, act_quant

# From this many elements on, torch's own operator passes over memory more often than need be.
_MANY = 1 << 15
_TILE = 1 << 18  # elements normed at once: in fp32 they stay in the cache
_ZERO = torch.zeros((), dtype=torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]; computed in fp32, given in x's dtype.

    `DeepseekV3RMSNorm` in transformers rounds to x's dtype before the weight, this after it.
    """
    num_elements = x.numel()
    # A row: its scale is a number, for which a GPU would have to be waited for.
    if num_elements == x.shape[-1] and x.dtype == torch.bfloat16 and not x.is_cuda:
        norm = float(torch.linalg.vector_norm(x, dtype=torch.float32))
        scale = (norm * norm / num_elements + eps) ** -0.5
        return torch.addcmul(_ZERO, x, weight, value=scale)
    if num_elements < _MANY:
        return torch.rms_norm(x, weight.shape, weight, eps)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    num_tiles = -(-num_elements // _TILE)
    for part, normed in zip(x.chunk(num_tiles), out.chunk(num_tiles), strict=True):
        wide = part.float()
        scales = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed.copy_((wide * scales).mul_(weight))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual [T, D] -> their sum's `rms_norm`, and the sum, rounded to x's dtype first."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Quantized]:
    """x [T, D] -> its `rms_norm`, and that quantised."""
    normed = rms_norm(x, weight, eps)
    return normed, act_quant(normed)


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Quantized, Tensor]:
    """x and residual [T, D] -> `add_rms_norm`'s first, quantised, and the sum."""
    normed, total = add_rms_norm(x, residual, weight, eps)
    return act_quant(normed), total
