"""Prefill attention in plain torch: expand latents to keys and values, then masked attention."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from tidemill.kernels.linear import Linear

# Scores held at once, H * rows * keys: 32 MiB in fp32. Smaller blocks read the keys too often.
_MOST_SCORES = 1 << 23
_MOST_ROWS = 128  # a block computes scores past the diagonal in vain, half of this a row


def mla_prefill(
    query: Tensor, latents: Tensor, kv_b: Linear, *, kv_lora_rank: int, start: int, scale: float
) -> Tensor:
    """Attend from positions [start, start + T) to all positions before and including each.

    query [T, H, nope + rope]; latents [start + T, kv_lora + rope], cached prefix and this chunk;
    kv_b maps kv_lora -> H * (nope + v). Returns [T, H, v]. (DeepSeek-V2 report 2.1.)
    """
    latent, k_rope = latents.tensor_split([kv_lora_rank], dim=-1)
    expanded = kv_b(latent.contiguous()).view(len(latents), query.shape[1], -1)
    return _attend(query, expanded, k_rope, start=start, scale=scale)


def mla_prefill_ragged(
    query: Tensor,
    expanded: Tensor,
    k_rope: Tensor,
    query_starts: Tensor,
    context_starts: Tensor,
    *,
    longest: int,
    scale: float,
) -> Tensor:
    """`mla_prefill` for N prompts that lie one after the other, their keys expanded already.

    query [T, H, nope + rope]; expanded [C, H, nope + v], what kv_b gives for the latents of all
    contexts, cached prefixes included; k_rope [C, rope]. Prompt n has the rows from
    query_starts[n] to query_starts[n + 1] and the context from context_starts[n] to
    context_starts[n + 1], of which its rows are the last: both [N + 1], on the tensors' device.
    `longest` (host): at least the most rows of one prompt. Returns [T, H, v].
    """
    bounds = zip(pairwise(query_starts.tolist()), pairwise(context_starts.tolist()), strict=True)
    parts = []
    for (first, last), (context, end) in bounds:
        if last - first > longest:
            raise ValueError(f"mla_prefill: a prompt of {last - first} rows; longest={longest}")
        start = end - context - (last - first)
        keys, ropes = expanded[context:end], k_rope[context:end]
        parts.append(_attend(query[first:last], keys, ropes, start=start, scale=scale))
    return torch.cat(parts)


def _attend(query: Tensor, expanded: Tensor, k_rope: Tensor, *, start: int, scale: float) -> Tensor:
    """One prompt's query, with start positions before it, over its keys and values.

    In blocks of queries, each over the keys that it may see, with the keys of a head together: on a
    CPU quicker than `scaled_dot_product_attention`, and like it with scores in fp32.
    """
    num_tokens, num_heads, head_dim = query.shape
    length = len(expanded)
    expanded = expanded.transpose(0, 1)
    k_nope, value = expanded.tensor_split([head_dim - k_rope.shape[-1]], dim=-1)
    key = torch.cat((k_nope, k_rope.expand(num_heads, -1, -1)), dim=-1).float().transpose(1, 2)
    rounded, query = query.dtype, query.transpose(0, 1).float()

    rows = min(_MOST_ROWS, max(1, _MOST_SCORES // (num_heads * length)))
    unseen = _unseen(rows, query.device)
    parts = []
    for first in range(0, num_tokens, rows):
        last = min(first + rows, num_tokens)
        scores = torch.bmm(query[:, first:last], key[..., : start + last]).mul_(scale)
        scores[..., start + first :].add_(unseen[: last - first, : last - first])
        weights = scores.softmax(-1).to(rounded)
        parts.append(torch.bmm(weights, value[:, : start + last]))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return attended.transpose(0, 1)


@cache
def _unseen(rows: int, device: torch.device) -> Tensor:
    """[rows, rows]: -inf where a column comes after its row, else 0; made once for all layers."""
    with torch.inference_mode(False):
        return torch.full((rows, rows), float("-inf"), device=device).triu(1)
