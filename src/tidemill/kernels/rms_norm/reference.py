"""RMSNorm in plain torch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D]; computed in fp32, given in x's dtype.

    `DeepseekV3RMSNorm` in transformers rounds to x's dtype before the weight, this after it.
    """
    return torch.rms_norm(x, weight.shape, weight, eps)
