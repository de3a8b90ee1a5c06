"""Products with a plain torch weight."""

from torch import Tensor
from torch.nn.functional import linear


class PlainLinear:
    """weight [N, K], used as it is."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> x @ weight.T [T, N]."""
        return linear(x, self.weight)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T) + other [T, N]."""
        return linear(x, self.weight) + other
