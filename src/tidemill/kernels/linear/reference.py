"""Products with a plain torch weight."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from tidemill.kernels.rms_norm import rms_norm


class PlainLinear:
    """weight [N, K] and bias [N], used as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> x @ weight.T + bias [T, N]."""
        return linear(x, self.weight, self.bias)

    def of_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The product with `rms_norm(x, norm, eps)` [T, N]."""
        return self(rms_norm(x, norm, eps))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T + bias) + other [T, N]."""
        return linear(x, self.weight, self.bias) + other

    def filled(self, x: Tensor) -> Tensor:
        """x [T, D] as it is: any number of rows will do."""
        return x

    def enough(self, num_rows: int) -> int:
        """num_rows as it is."""
        return num_rows


class PlainHeads:
    """weight [H, N, K], one matrix a head."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H, K] -> each head's x @ weight.T [T, H, N], dense."""
        out = x.new_empty(len(x), len(self.weight), self.weight.shape[-1])
        self.into(x, out)
        return out

    def into(self, x: Tensor, out: Tensor) -> None:
        """x [T, H, K], each head's x @ weight.T -> out [T, H, N], whose rows may lie apart."""
        if x.is_cuda:
            torch.bmm(x.transpose(0, 1), self.weight, out=out.transpose(0, 1))
        else:  # a CPU would multiply head by head into rows that lie apart
            out.copy_(torch.bmm(x.transpose(0, 1), self.weight).transpose(0, 1))
