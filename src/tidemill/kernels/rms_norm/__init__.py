"""Root-mean-square normalisation, with the sum before it and the quantisation after it."""

from typing import Literal, overload

from torch import Tensor

from tidemill.kernels.act_quant import Quantized
from tidemill.kernels.choice import takes_triton
from tidemill.kernels.rms_norm import reference

__all__ = ["add_rms_norm", "add_rms_norm_quant", "rms_norm", "rms_norm_quant"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]; computed in fp32, given in x's dtype.

    `DeepseekV3RMSNorm` in transformers rounds to x's dtype before the weight, this after it.
    """
    if takes_triton(x):
        from tidemill.kernels.rms_norm import kernel

        return kernel.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x and residual [T, D] -> their sum's `rms_norm`, and the sum, rounded to x's dtype first."""
    if takes_triton(x):
        from tidemill.kernels.rms_norm import kernel

        return kernel.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


@overload
def rms_norm_quant(x: Tensor, weight: Tensor, eps: float) -> Quantized: ...
@overload
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, keep: Literal[True]
) -> tuple[Tensor, Quantized]: ...
def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, keep: bool = False
) -> Quantized | tuple[Tensor, Quantized]:
    """x [T, D] -> `act_quant` of its `rms_norm`; with `keep` also what was quantised.

    A router's gate takes the rows as they are, the experts take them quantised.
    """
    if takes_triton(x):
        from tidemill.kernels.rms_norm import kernel

        normed, quantized = kernel.rms_norm_quant(x, weight, eps, keep=keep)
        return quantized if normed is None else (normed, quantized)
    both = reference.rms_norm_quant(x, weight, eps)
    return both if keep else both[1]


def add_rms_norm_quant(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Quantized, Tensor]:
    """x and residual [T, D] -> `act_quant` of `add_rms_norm`'s first, and the sum."""
    if takes_triton(x):
        from tidemill.kernels.rms_norm import kernel

        return kernel.add_rms_norm_quant(x, residual, weight, eps)
    return reference.add_rms_norm_quant(x, residual, weight, eps)
