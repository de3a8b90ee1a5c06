"""Makes transformers train MLA with torch's fused CPU attention."""

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

NAME = "causal_padded"


def causal_padded(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    **_kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Plain causal attention, no padding in the batch.

    query, key [batch, heads, tokens, qk_head_dim], value [batch, heads, tokens, v_head_dim] ->
    [batch, tokens, heads, v_head_dim]. torch fuses only where all three have one head size, so
    value is padded with zeros to qk_head_dim; without this, attention is half of the step.
    """
    width = value.size(-1)
    padded = functional.pad(value, (0, query.size(-1) - width))
    output = functional.scaled_dot_product_attention(
        query, key, padded, is_causal=True, scale=scaling
    )
    return output[..., :width].transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, causal_padded)
