"""Products with a weight that stays FP8: activations are quantised on the fly, as in training."""

import torch
from torch import Tensor

from tidemill.kernels.act_quant import Quantized, act_quant
from tidemill.kernels.fp8_gemm import fp8_gemm
from tidemill.kernels.rms_norm import rms_norm_quant


class BlockScaledLinear:
    """weight [N, K] e4m3, scale_inv [ceil(N / 128), K / 128] fp32, bias [N]; K a multiple of 128.

    The product of 1x128 and 128x128 scaled blocks of DeepSeek-V3's report, 3.3.
    """

    def __init__(self, weight: Tensor, scale_inv: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.scale_inv = scale_inv
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> x @ weight.T + bias [T, N]."""
        return self._times(act_quant(x), x.dtype)

    def of_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The product with `rms_norm(x, norm, eps)` [T, N], quantised in the same launch."""
        return self._times(rms_norm_quant(x, norm, eps), x.dtype)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T + bias) + other [T, N]."""
        return self._times(act_quant(x), x.dtype, residual=other)

    def filled(self, x: Tensor) -> Tensor:
        """x [T, D] as it is: any number of rows will do."""
        return x

    def enough(self, num_rows: int) -> int:
        """num_rows as it is."""
        return num_rows

    def _times(self, rows: Quantized, dtype: torch.dtype, residual: Tensor | None = None) -> Tensor:
        return fp8_gemm(
            rows,
            self.weight,
            self.scale_inv,
            out_dtype=dtype,
            bias=self.bias,
            residual=residual,
        )
