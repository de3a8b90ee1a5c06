"""Decode attention in plain torch: every head is a query row against the shared latents."""

import torch
from torch import Tensor


def mla_decode(
    query: Tensor,
    latents: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    *,
    kv_lora_rank: int,
    scale: float,
) -> Tensor:
    """Attend from one position per sequence to its first context_lens positions.

    query [B, H, D] already absorbed (W_UK applied), D = kv_lora + rope; latents [blocks, 64, D],
    one layer's pool; block_tables [B, M], padded with any valid block; context_lens [B].
    Returns the attended latents [B, H, kv_lora], to which the caller applies W_UV.
    (DeepSeek-V2 report 2.1.2; FlashMLA's paged layout.)

    Or from the last S positions (a drafted token rides along): query [B, S, H, D] gives
    [B, S, H, kv_lora], and token s sees context_lens - (S - 1 - s) positions, at least one.

    Two batched products with a padded copy of the context: on a CPU twice as fast as
    `scaled_dot_product_attention`, whose tiles suit long queries.
    """
    if query.ndim == 4:
        later = range(query.shape[1] - 1, -1, -1)
        outputs = [
            mla_decode(token, latents, block_tables, lens, kv_lora_rank=kv_lora_rank, scale=scale)
            for token, lens in zip(query.unbind(1), (context_lens - n for n in later), strict=True)
        ]
        return torch.stack(outputs, dim=1)
    num_sequences = query.shape[0]
    context = _rows(latents, block_tables).view(num_sequences, -1, latents.shape[-1])
    # In fp32: rounding scores of bf16 once cost half again the error of the whole model. Keys times
    # query, since MKL is up to three times slower on a product of few rows and many columns.
    columns = (query.float() * scale).transpose(1, 2)
    scores = torch.bmm(context.float(), columns).transpose(1, 2)
    if num_sequences == 1:
        scores[..., int(context_lens) :] = float("-inf")
    else:
        positions = torch.arange(context.shape[1], device=query.device)
        outside = positions >= context_lens.unsqueeze(1)
        scores.masked_fill_(outside.unsqueeze(1), float("-inf"))
    attended = torch.bmm(scores.softmax(-1).to(query.dtype), context)
    return attended[..., :kv_lora_rank]


def _rows(latents: Tensor, block_tables: Tensor) -> Tensor:
    """The tables' blocks one after the other: a copy, but for one sequence's neighbours."""
    if len(block_tables) == 1:
        blocks: list[int] = block_tables[0].tolist()
        first, end = blocks[0], blocks[0] + len(blocks)
        if blocks == list(range(first, end)):
            return latents[first:end]
    return latents.index_select(0, block_tables.flatten())
