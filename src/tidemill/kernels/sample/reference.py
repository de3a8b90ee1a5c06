"""Drawing the next token in plain torch: Gumbel-max over what the filters leave, row by row.

B rows, V tokens of the vocabulary, R rows that are adjusted. All arithmetic is fp64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tidemill.kernels.sample.noise import gumbel_noise

GREEDY_BELOW = 1e-6  # a temperature that no draw could tell from greedy, and no division survives
NONE_ALLOWED = -1  # in place of a token where the bias leaves none


@dataclass(frozen=True)
class Adjustments:
    """What is added to some rows' logits first. Tables are wide: rows that need none have none."""

    rows: Tensor  # [B] int32: the row's row in the tables, or -1
    repetition: (
        Tensor  # [R] fp64: divides positive logits of seen tokens, multiplies others; 1 = off
    )
    presence: Tensor  # [R] fp64: taken from tokens of the completion
    frequency: Tensor  # [R] fp64: the same, for each time
    seen: Tensor  # [R, V] int32: twice how often in the completion, plus 1 if in the prompt
    bias: Tensor  # [R, V] fp64: added last; -inf forbids


@dataclass(frozen=True)
class Draws:
    """How each row is drawn from; all [B]. Values that switch a filter off are in brackets."""

    temperature: Tensor  # fp64; below GREEDY_BELOW: the highest
    top_k: Tensor  # int32: likeliest tokens kept (0)
    top_p: Tensor  # fp64: least set of likeliest tokens that reaches this mass (1)
    min_p: Tensor  # fp64: least share of the likeliest token's probability (0)
    seeds: Tensor  # int64: 64 bits
    positions: Tensor  # int64: absolute, of the token to be drawn
    adjustments: Adjustments | None = None


def sample(logits: Tensor, draws: Draws) -> Tensor:
    """logits [B, V] -> token ids [B] int64, or NONE_ALLOWED."""
    return torch.tensor(
        [_sample_row(logits[row], draws, row) for row in range(len(logits))],
        dtype=torch.int64,
        device=logits.device,
    )


def gumbel_max(
    scaled: Tensor, *, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> int:
    """scaled [V], fp64 logits over temperature -> one token id. Ties with a filter's last stay."""
    ids = torch.arange(len(scaled), device=scaled.device)
    kept = scaled
    if 0 < top_k < len(kept):
        keep = kept >= kept.topk(top_k).values[-1]
        ids, kept = ids[keep], kept[keep]
    if top_p < 1:
        keep = _reaching_mass(kept.softmax(-1), top_p)
        ids, kept = ids[keep], kept[keep]
    if min_p > 0:
        keep = kept >= kept.max() + math.log(min_p)
        ids, kept = ids[keep], kept[keep]
    noise = gumbel_noise(seed, position, ids)
    return int(ids[noise.add_(kept).argmax()])


def _sample_row(logits: Tensor, draws: Draws, row: int) -> int:
    values = logits.float().double()
    if draws.adjustments is not None:
        values = _adjusted(values, draws.adjustments, row)
    if values.max() == -math.inf:
        return NONE_ALLOWED
    temperature = float(draws.temperature[row])
    if temperature < GREEDY_BELOW:
        return int(values.argmax())
    return gumbel_max(
        values / temperature,
        top_k=int(draws.top_k[row]),
        top_p=float(draws.top_p[row]),
        min_p=float(draws.min_p[row]),
        seed=int(draws.seeds[row]) & (1 << 64) - 1,
        position=int(draws.positions[row]),
    )


def _adjusted(values: Tensor, adjustments: Adjustments, row: int) -> Tensor:
    at = int(adjustments.rows[row])
    if at < 0:
        return values
    seen, penalty = adjustments.seen[at], adjustments.repetition[at]
    times = seen >> 1
    punished = torch.where(values > 0, values / penalty, values * penalty)
    values = torch.where(seen > 0, punished, values)
    values = torch.where(times > 0, values - adjustments.presence[at], values)
    return values - adjustments.frequency[at] * times + adjustments.bias[at]


def _reaching_mass(probabilities: Tensor, top_p: float) -> Tensor:
    """Mask [N] of the likeliest tokens up to the one that reaches mass top_p; ties with it stay."""
    count = min(_LIKELIEST, len(probabilities))
    ordered = probabilities.topk(count).values
    while count < len(probabilities) and ordered.sum() < top_p:
        count = min(8 * count, len(probabilities))
        ordered = probabilities.topk(count).values
    last = int((ordered.cumsum(-1) < top_p).sum().clamp(max=len(ordered) - 1))
    return probabilities >= ordered[last]


# Sorting a whole vocabulary costs milliseconds, and a trained model's mass lies in few tokens.
_LIKELIEST = 1024
