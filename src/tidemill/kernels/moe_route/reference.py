"""Routing in plain torch: softmax or sigmoid scores, free or limited to the best groups."""

from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor


class Rule(TypedDict):
    """How experts are chosen and weighed; what each does is told at `moe_route`."""

    scoring_func: str
    n_group: int
    topk_group: int
    top_k: int
    normalize: bool
    scale: float


@dataclass(frozen=True)
class Routed:
    """Each token's experts, and all choices in the order of their experts.

    A choice's number is t * K + k. Expert e has rows[starts[e] : starts[e] + counts[e]], ascending.
    """

    weights: Tensor  # [T, K] fp32
    ids: Tensor  # [T, K] int32
    rows: Tensor  # [T * K] int32, the number of the choice at each place
    starts: Tensor  # [E] int32
    counts: Tensor  # [E] int32


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    *,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """fp32 logits [T, E], bias [E] -> weights [T, K] fp32 and expert ids [T, K] int64.

    "sigmoid" is `noaux_tc` (DeepSeek-V3 report 2.1.2, transformers' `DeepseekV3TopkRouter`): groups
    are ranked by their two best biased scores; the bias steers the choice only, never the weights.

    "softmax" is `greedy` and `group_limited_greedy` (DeepSeek-V2 report 2.2.2, transformers'
    `DeepseekV2TopkRouter`): groups are ranked by their best score; no bias. With `normalize` the
    weights sum to 1 and `scale` is left out, as in the published code; transformers' class knows
    no normalising and no published model of that family asks for it.
    """
    sigmoid = scoring_func == "sigmoid"
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if topk_group < n_group:
        grouped = choice.view(len(choice), n_group, -1)
        group_scores = grouped.topk(2, dim=-1).values.sum(-1) if sigmoid else grouped.amax(-1)
        kept = group_scores.topk(topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, ids)
    if normalize and (sigmoid or top_k > 1):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * scale if sigmoid else weights, ids
    return weights * scale, ids


def route_and_sort(logits: Tensor, bias: Tensor | None, **rule: Unpack[Rule]) -> Routed:
    """`moe_route`, and the choices in the order of their experts."""
    weights, ids = moe_route(logits, bias, **rule)
    flat = ids.flatten()
    counts = flat.bincount(minlength=logits.shape[1])
    starts = counts.cumsum(0) - counts
    rows = flat.argsort(stable=True)
    return Routed(weights, ids.int(), rows.int(), starts.int(), counts.int())
