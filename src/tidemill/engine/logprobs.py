"""How likely tokens were: fp32 log-softmax of the model's own logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tidemill.engine.device import send

MAX_TOP_LOGPROBS = 20

# The most prompt tokens that are scored: each costs a row of the vocabulary, and on the wire up to
# 160 bytes of a message that holds 8 MiB.
MAX_SCORED_PROMPT_TOKENS = 8192

_ROWS = 32  # of the vocabulary at a time: 16 MiB of logits at 129,280 tokens


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probability of one token, and the likeliest in its place, likeliest first."""

    logprob: float
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


def token_logprobs(logits: Tensor, token_id: int, top: int) -> TokenLogprobs:
    """logits [V] fp32, untouched -> token_id's, and `top` alternatives; of equal ones low ids."""
    logprobs = logits.log_softmax(-1)
    own = float(logprobs[token_id])
    if top == 0:
        return TokenLogprobs(own)
    top = min(top, len(logprobs))
    least = logprobs.topk(top).values[-1]
    ids = (logprobs >= least).nonzero().flatten()
    order = logprobs[ids].sort(descending=True, stable=True).indices[:top]
    ids = ids[order]
    return TokenLogprobs(own, tuple(ids.tolist()), tuple(logprobs[ids].tolist()))


def rows_logprobs(
    logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """`token_logprobs` of each row of logits [N, V], with its own number of alternatives.

    A CPU goes row by row; a GPU sorts all of them, and is waited for once.
    """
    if logits.is_cuda:
        return logprobs_together(logits, token_ids, tops)
    triples = zip(logits, token_ids, tops, strict=True)
    return [token_logprobs(row.float(), token_id, top) for row, token_id, top in triples]


def logprobs_together(
    logits: Tensor, token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    """As `rows_logprobs`, by a sort of whole rows: a few launches however many rows there are."""
    logprobs = logits.float().log_softmax(-1)
    most = min(max(tops), logprobs.shape[1])
    ids = logprobs.sort(descending=True, stable=True).indices[:, :most]
    own = send(torch.tensor(token_ids).unsqueeze(1), logits.device)
    places = torch.cat((own, ids), dim=1)
    # As one tensor, for one transfer: an id is far below the integers that fp64 holds.
    told = torch.stack((places.double(), logprobs.gather(1, places).double())).tolist()
    return [
        TokenLogprobs(values[0], tuple(map(int, ids[1 : top + 1])), tuple(values[1 : top + 1]))
        for ids, values, top in zip(*told, tops, strict=True)
    ]


def prompt_logprobs(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, next_ids: Sequence[int], top: int
) -> list[TokenLogprobs]:
    """hidden [N, H] before each of next_ids [N] -> N entries.

    `logits_of` maps hidden states [R, H] to logits [R, V]; it is asked for a few rows at a time.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(next_ids), _ROWS):
        ids = next_ids[start : start + _ROWS]
        logits = logits_of(hidden[start : start + _ROWS]).float()
        found += rows_logprobs(logits, ids, [top] * len(ids))
    return found
