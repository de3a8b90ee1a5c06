"""RoPE on halves, in plain torch. Interleaved checkpoints are permuted to halves when loaded."""

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + R/2]) of x [..., R] by angles given as fp32 cos, sin [..., R/2].

    Same result as transformers' `apply_rotary_pos_emb_interleave` on the unpermuted vector.
    """
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)
