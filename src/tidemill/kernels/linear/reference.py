"""Products with a plain torch weight."""

from torch import Tensor
from torch.nn.functional import linear, silu


class PlainLinear:
    """weight [N, K], used as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> x @ weight.T [T, N]."""
        return linear(x, self.weight)

    def silu(self, x: Tensor) -> Tensor:
        """silu(x @ weight.T) [T, N]."""
        return silu(linear(x, self.weight))

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T) * other [T, N]."""
        return linear(x, self.weight) * other

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T) + other [T, N]."""
        return linear(x, self.weight) + other
