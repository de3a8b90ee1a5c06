"""A weight and its product, laid out for the device once at load."""

from torch import Tensor

from tidemill.kernels.linear import onednn, reference

Linear = reference.PlainLinear | onednn.PackedLinear

__all__ = ["Linear", "make_linear"]


def make_linear(weight: Tensor) -> Linear:
    """Wrap weight [N, K]: packed by oneDNN for bf16 on a CPU, else as it is.

    Packing doubles small-batch speed (the products are bound by reading weights) and copies the
    weight, so a memory-mapped one is read once.
    """
    if onednn.can_pack(weight):
        return onednn.PackedLinear(weight)
    return reference.PlainLinear(weight)
