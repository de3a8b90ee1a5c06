"""Products with a weight in oneDNN's blocked layout, through the operators that Inductor uses."""

import os

import torch
from torch import Tensor
from torch.nn.functional import pad

from tidemill.kernels.rms_norm import rms_norm

# Rows that the layout is chosen for: decode batches; larger products lose nothing by it.
PACK_ROWS = 16
# A product of one or two rows takes longer than one of four, which hides more of memory's latency.
FEWEST_ROWS = 4
# Half a megabyte is kept for every number of rows that a weight's shape ever met, by oneDNN and by
# torch's layer above it, each up to a limit that they read at their first product: 1024 if unset.
# 256 hold what a step meets; preparing one anew takes 0.3 ms.
for _limit in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_limit, "256")
# Experts meet hundreds of numbers of rows, more than are kept; powers of two up to this and
# multiples of it are a few dozen.
ROWS_STEP = 16
_POINTWISE = ([0, 0], [1, 1], [1, 1])  # padding, stride, dilation


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
        num_rows = x.shape[0]  # `len` of a tensor takes as long as a small operator
        if num_rows < FEWEST_ROWS:
            return self(self.filled(x))[:num_rows]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def of_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The product with `rms_norm(x, norm, eps)` [T, N]."""
        return self(rms_norm(x, norm, eps))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x @ weight.T + bias) + other [T, N]."""
        num_rows = x.shape[0]
        if num_rows < FEWEST_ROWS:
            return self.plus(self.filled(x), self.filled(other))[:num_rows]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, other, self.weight, self.bias, "add")
        return out

    def filled(self, x: Tensor) -> Tensor:
        """x [T, D], with rows of zeros below it where T rows take longer than more would."""
        missing = FEWEST_ROWS - x.shape[0]
        return pad(x, (0, 0, 0, missing)) if missing > 0 else x

    def enough(self, num_rows: int) -> int:
        """The number of rows to multiply, at least num_rows, where others can fill them up."""
        size = FEWEST_ROWS
        while size < min(num_rows, ROWS_STEP):
            size *= 2
        return size if num_rows <= size else -(-num_rows // ROWS_STEP) * ROWS_STEP


class PackedHeads:
    """weight [H, N, K] bf16, one matrix a head, reordered once.

    As a grouped 1x1 convolution over the rows: oneDNN packs no weight for a batched product, and
    reads an unpacked one at half the speed.
    """

    def __init__(self, weight: Tensor) -> None:
        self.num_heads, columns = weight.shape[0], weight.shape[2]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            weight.reshape(-1, columns, 1, 1),
            *_POINTWISE,
            self.num_heads,
            [1, self.num_heads * columns, PACK_ROWS, 1],
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H, K] -> each head's x @ weight.T [T, H, N]."""
        num_rows = x.shape[0]
        image = x.reshape(1, num_rows, 1, -1).permute(0, 3, 1, 2)  # channels last, T pixels
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            image, self.weight, None, *_POINTWISE, self.num_heads, "none", [], ""
        )
        return out.permute(0, 2, 3, 1).reshape(num_rows, self.num_heads, -1)

    def into(self, x: Tensor, out: Tensor) -> None:
        """x [T, H, K], each head's x @ weight.T -> out [T, H, N], whose rows may lie apart."""
        out.copy_(self(x))
