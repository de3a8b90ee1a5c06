"""Weights stored as FP8 e4m3 with one scale for each block of rows and columns."""

import torch
from torch import Tensor

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
    out = torch.empty(weight.shape, dtype=dtype)
    rows, columns = block
    step = max(STRIP_ROWS // rows, 1)
    for index in range(0, len(scale_inv), step):
        strip = slice(index * rows, (index + step) * rows)
        scales = scale_inv[index : index + step].float()
        scales = scales.repeat_interleave(columns, 1)[:, : weight.shape[1]]
        scales = scales.repeat_interleave(rows, 0)[: len(weight) - index * rows]
        out[strip] = scales.mul_(weight[strip].float())
    return out
