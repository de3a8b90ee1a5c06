"""RoPE on adjacent pairs, as complex numbers, in plain torch."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate pairs (x[2i], x[2i + 1]) of x [..., R] by complex64 rotation [..., R/2], in fp32.

    As DeepSeek's `apply_rotary_emb`; checkpoints that pair halves are permuted when loaded.
    """
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
