"""Norm, RoPE and cache write in plain torch."""

import torch
from torch import Tensor

from tidemill.kernels.rms_norm.reference import rms_norm
from tidemill.kernels.rope import apply_rope


def rope_kv_write(
    query: Tensor,
    kv_a: Tensor,
    norm_weight: Tensor,
    eps: float,
    rotation: Tensor,
    latents: Tensor,
    slots: Tensor,
    written: Tensor | None,
    decoding: Tensor | None,
) -> None:
    """As the op: RoPE parts are rotated, rows of latents are written."""
    rope = 2 * rotation.shape[-1]
    latent, k_rope = kv_a.tensor_split([-rope], dim=-1)
    q_rope = query[..., -rope:]
    # The shared key turns as one more head.
    turned = apply_rope(torch.cat((q_rope, k_rope.unsqueeze(1)), dim=1), rotation.unsqueeze(1))
    num_decoding = 0
    if decoding is not None:
        num_decoding = len(decoding)
        decoding.copy_(turned[:num_decoding, :-1])
    q_rope[num_decoding:] = turned[num_decoding:, :-1]
    rows = torch.cat((rms_norm(latent, norm_weight, eps), turned[:, -1]), dim=-1)
    if written is not None:
        rows = rows[written]
    latents.view(-1, latents.shape[-1]).index_copy_(0, slots, rows)
