"""Drawing one token for each row of logits."""

from torch import Tensor

from tidemill.kernels.choice import takes_triton
from tidemill.kernels.sample import reference
from tidemill.kernels.sample.reference import (
    GREEDY_BELOW,
    NONE_ALLOWED,
    Adjustments,
    Draws,
    gumbel_max,
)

__all__ = ["GREEDY_BELOW", "NONE_ALLOWED", "Adjustments", "Draws", "gumbel_max", "sample"]


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """logits [B, V] fp32, bf16 or fp16 -> token ids [B] int64, or NONE_ALLOWED.

    A row's draw depends on its own logits, parameters, seed and position alone. The Triton path
    takes the same sums in another order: it may differ where a filter's bound or two scores are
    within 1e-12 of a tie.
    """
    if takes_triton(logits):
        from tidemill.kernels.sample import kernel

        return kernel.sample(logits, draws)
    return reference.sample(logits, draws)
