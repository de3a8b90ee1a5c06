"""Products with a plain torch weight."""

from torch import Tensor
from torch.nn.functional import linear


class PlainLinear:
    """weight [N, K] and bias [N], used as they are."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> x @ weight.T + bias [T, N]."""
        return linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T + bias) + other [T, N]."""
        return linear(x, self.weight, self.bias) + other
