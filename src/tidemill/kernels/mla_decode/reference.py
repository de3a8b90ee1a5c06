"""Decode attention in plain torch: every head is a query row against the shared latents."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def mla_decode(
    query: Tensor, latents: Tensor, block_tables: Tensor, context_lens: Tensor, *, scale: float
) -> Tensor:
    """Attend from one position per sequence to its first context_lens positions.

    query [B, H, D] already absorbed (W_UK applied), D = kv_lora + rope; latents [blocks, 64, D],
    one layer's pool; block_tables [B, M] int64, padded with any valid block; context_lens [B].
    Returns the attended latents [B, H, D]; the caller drops the rope part and applies W_UV.
    (DeepSeek-V2 report 2.1.2; FlashMLA's paged layout.)
    """
    batch = len(block_tables)
    context = latents.index_select(0, block_tables.reshape(-1)).view(
        batch, 1, -1, latents.shape[-1]
    )
    positions = torch.arange(context.shape[2], device=query.device)
    outside = (positions >= context_lens.unsqueeze(1)).view(batch, 1, 1, -1)
    mask = torch.zeros(outside.shape, dtype=query.dtype, device=query.device)
    mask.masked_fill_(outside, float("-inf"))
    out = scaled_dot_product_attention(
        query.unsqueeze(1), context, context, attn_mask=mask, scale=scale
    )
    return out.squeeze(1)
