"""Prefill attention in plain torch: masked attention, prompt after prompt."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

# Scores held at once, H * rows * keys: 32 MiB in fp32. Smaller blocks read the keys too often.
_MOST_SCORES = 1 << 23
_MOST_ROWS = 128  # a block computes scores past the diagonal in vain, half of this a row


def mla_prefill_ragged(
    query: Tensor,
    expanded: Tensor,
    k_rope: Tensor,
    query_starts: Tensor,
    context_starts: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Chunks of N prompts, each attending to its cached prefix and to itself, causally.

    query [T, H, nope + rope]; expanded [C, H, nope + v], keys and values of all contexts; k_rope
    [C, rope], the rotated part of the keys, which all heads share. Prompt n has the rows from
    query_starts[n] to query_starts[n + 1] and the context from context_starts[n] to
    context_starts[n + 1], of which its rows are the last: both [N + 1], on the tensors' device.
    Returns [T, H, v].
    """
    bounds = zip(pairwise(query_starts.tolist()), pairwise(context_starts.tolist()), strict=True)
    parts = [
        _attend(
            query[first:last],
            expanded[context:end],
            k_rope[context:end],
            start=end - context - (last - first),
            scale=scale,
        )
        for (first, last), (context, end) in bounds
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
