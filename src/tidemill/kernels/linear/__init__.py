"""A weight and its product, laid out for the device once at load."""

from torch import Tensor

from tidemill.kernels.linear import onednn, reference
from tidemill.kernels.linear.block_scaled import BlockScaledLinear

Linear = reference.PlainLinear | onednn.PackedLinear | BlockScaledLinear
HeadLinear = reference.PlainHeads | onednn.PackedHeads

__all__ = ["BlockScaledLinear", "HeadLinear", "Linear", "make_head_linear", "make_linear"]


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Wrap weight [N, K] and bias [N]: packed by oneDNN for bf16 on a CPU, else as they are.

    Packing doubles small-batch speed: the products are bound by reading weights. It copies the
    weight.
    """
    if onednn.can_pack(weight):
        return onednn.PackedLinear(weight, bias)
    return reference.PlainLinear(weight, bias)


def make_head_linear(weight: Tensor) -> HeadLinear:
    """Wrap weight [H, N, K], one matrix a head, in the layout that `make_linear` would choose."""
    if onednn.can_pack(weight):
        return onednn.PackedHeads(weight)
    return reference.PlainHeads(weight)
