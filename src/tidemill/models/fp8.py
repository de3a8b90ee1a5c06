"""Weights stored as FP8 e4m3 with one scale for each block of rows and columns."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # rows and columns of the one form that kernels multiply
# Rows that are widened at a time: what a large matrix takes beside itself stays small.
STRIP_ROWS = 512


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Scales of a matrix of `shape`: one a block, those at the lower and right edge ragged."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(
    weight: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """weight [N, K] e4m3 times its block's scale in fp32, rounded once to `dtype`.

    scale_inv of `scale_shape`, fp32 or e8m0 (a power of two). Despite its name, from DeepSeek's
    files, it is the factor itself: `weight_dequant` in DeepSeek-V3's `inference/kernel.py`.
    """
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    rows, columns = block
    step = max(STRIP_ROWS // rows, 1)
    for index in range(0, len(scale_inv), step):
        strip = slice(index * rows, (index + step) * rows)
        scales = scale_inv[index : index + step].float()
        scales = scales.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        scales = scales.repeat_interleave(rows, 0)[: len(weight) - index * rows]
        out[strip] = scales.mul_(weight[strip].float())
    return out


@dataclass(frozen=True)
class Fp8Matrix:
    """A weight that stays as it is stored, in blocks of 128 rows and columns."""

    values: Tensor  # [N, K] e4m3
    scales: Tensor  # [ceil(N / 128), ceil(K / 128)] fp32

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[N, K] in `dtype`."""
        return dequantize(self.values, self.scales, (BLOCK, BLOCK), dtype)

    def reordered(self, order: Tensor) -> "Fp8Matrix | None":
        """Rows in `order` [N]; None where one would leave its block and with it its scale."""
        if not torch.equal(order // BLOCK, torch.arange(len(order)) // BLOCK):
            return None
        return Fp8Matrix(self.values.view(torch.uint8)[order].view(self.values.dtype), self.scales)

    def above(self, other: "Fp8Matrix") -> "Fp8Matrix | None":
        """Both as one matrix, `other` below; None where this one ends within a block."""
        if len(self.values) % BLOCK:
            return None
        values = torch.cat([each.values.view(torch.uint8) for each in (self, other)])
        return Fp8Matrix(values.view(self.values.dtype), torch.cat((self.scales, other.scales)))

    def to(self, device: torch.device) -> "Fp8Matrix":
        """The same on `device`."""
        return Fp8Matrix(self.values.to(device), self.scales.to(device))
