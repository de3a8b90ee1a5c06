"""FP8 activations in plain torch. T rows, D values of a row, G = D / 128 groups."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

GROUP = 128  # values that share a scale (DeepSeek-V3 report 3.3.2)
LARGEST = 448.0  # of e4m3
SMALLEST_AMAX = 1e-4  # a group of zeros has a scale too (DeepGEMM's `per_token_cast_to_fp8`)


@dataclass(frozen=True)
class Quantized:
    """Rows x of activations: x[t, d] is about values[t, d] * scales[t, d // 128]."""

    values: Tensor  # [T, D] float8_e4m3fn, contiguous
    scales: Tensor  # [T, G] fp32, strides (1, T): a tile of rows reads neighbours


def act_quant(x: Tensor) -> Quantized:
    """x [T, D] in any floating dtype, D a multiple of 128, rounded to the nearest e4m3.

    A group's scale is max(amax, 1e-4) / 448, as DeepGEMM's `per_token_cast_to_fp8` has it.
    """
    scaled, scales = scale_groups(x)
    return Quantized(scaled.to(torch.float8_e4m3fn), scales)


def swiglu_quant(gate_up: Tensor) -> Quantized:
    """gate_up [T, 2 * D], gate before up -> silu(gate) * up [T, D], quantised.

    The product is rounded to gate_up's dtype once, before its scale is taken.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    return act_quant((silu(gate) * up).to(gate_up.dtype))


def dequantize(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """The rows [T, D] again, multiplied in fp32 and rounded once to `dtype`."""
    groups = quantized.values.float().view(*quantized.scales.shape, GROUP)
    return (groups * quantized.scales.unsqueeze(-1)).flatten(-2).to(dtype)


def scale_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, D] -> fp32 [T, D] in e4m3's range, not yet rounded, and scales as in `Quantized`."""
    groups = x.float().reshape(x.shape[0], x.shape[1] // GROUP, GROUP)
    amax = groups.abs().amax(-1).clamp_min_(SMALLEST_AMAX)
    # A tensor, since a GPU divides by a number through its inverse, and rounds twice.
    largest = torch.tensor(LARGEST, device=x.device)
    scales = amax.new_empty(amax.shape[::-1]).t().copy_(amax / largest)
    return (groups * (largest / amax).unsqueeze(-1)).flatten(-2), scales
