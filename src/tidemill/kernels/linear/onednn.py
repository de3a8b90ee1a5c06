"""Products with a weight in oneDNN's blocked layout, through the operators that Inductor uses."""

import torch
from torch import Tensor

# Rows that the layout is chosen for: decode batches; larger products lose nothing by it.
PACK_ROWS = 16


def can_pack(weight: Tensor) -> bool:
    """Whether this build and CPU multiply bf16 natively; elsewhere the plain path is as fast."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class PackedLinear:
    """weight [N, K] bf16, reordered once, and bias [N] bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] -> x @ weight.T + bias [T, N]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T + bias) + other [T, N]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, other, self.weight, self.bias, "add")
        return out
