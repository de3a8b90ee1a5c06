"""Group-limited sigmoid routing in plain torch."""

import torch
from torch import Tensor


def moe_route(
    logits: Tensor,
    bias: Tensor,
    *,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """fp32 logits [T, E], bias [E] -> weights [T, K] fp32 and expert ids [T, K] int64.

    DeepSeek-V3 report 2.1.2 and `DeepseekV3TopkRouter` in transformers: sigmoid scores; groups are
    ranked by their two best biased scores; the bias steers the choice only, never the weights.
    """
    scores = logits.sigmoid()
    choice = scores + bias
    if topk_group < n_group:
        grouped = choice.view(len(choice), n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        kept = group_scores.topk(topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids
