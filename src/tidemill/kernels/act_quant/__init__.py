"""Activations as FP8 e4m3 with one scale for each 128 values of a row."""

from torch import Tensor

from tidemill.kernels.act_quant import reference
from tidemill.kernels.act_quant.reference import Quantized, dequantize
from tidemill.kernels.choice import takes_triton

__all__ = ["Quantized", "act_quant", "dequantize", "swiglu_quant"]


def act_quant(x: Tensor) -> Quantized:
    """x [T, D], D a multiple of 128, rounded to the nearest e4m3, a scale for each 128 values."""
    if takes_triton(x):
        from tidemill.kernels.act_quant import kernel

        return kernel.act_quant(x)
    return reference.act_quant(x)


def swiglu_quant(gate_up: Tensor) -> Quantized:
    """gate_up [T, 2 * D], gate before up -> silu(gate) * up [T, D], quantised."""
    if takes_triton(gate_up):
        from tidemill.kernels.act_quant import kernel

        return kernel.swiglu_quant(gate_up)
    return reference.swiglu_quant(gate_up)
