"""Prefill attention in plain torch: expand latents to keys and values, then masked attention."""

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from tidemill.kernels.linear import Linear


def mla_prefill(
    query: Tensor, latents: Tensor, kv_b: Linear, *, kv_lora_rank: int, start: int, scale: float
) -> Tensor:
    """Attend from positions [start, start + T) to all positions before and including each.

    query [T, H, nope + rope]; latents [start + T, kv_lora + rope], cached prefix and this chunk;
    kv_b maps kv_lora -> H * (nope + v). Returns [T, H, v]. (DeepSeek-V2 report 2.1.)
    """
    num_tokens, num_heads, head_dim = query.shape
    latent, k_rope = latents.tensor_split([kv_lora_rank], dim=-1)
    expanded = kv_b(latent.contiguous()).view(len(latents), num_heads, -1)
    v_head_dim = expanded.shape[-1] - head_dim + k_rope.shape[-1]
    k_nope, value = expanded.tensor_split([head_dim - k_rope.shape[-1]], dim=-1)
    key = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, num_heads, -1)), dim=-1)
    # As wide as keys: else torch leaves its flash path for one that holds all scores at once.
    value = pad(value, (0, head_dim - value.shape[-1]))
    mask = None
    if start and num_tokens > 1:
        mask = torch.ones(num_tokens, start + num_tokens, dtype=torch.bool, device=query.device)
        mask = mask.tril(start)
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=start == 0,
        scale=scale,
    )
    return out.squeeze(0).transpose(0, 1)[..., :v_head_dim]
