"""Choice of the next token: the highest of logit / temperature plus Gumbel noise (Gumbel-max).

The noise is a pure function of (seed, absolute position, token id), and everything else one of the
sequence's own tokens: a draw does not depend on the batch, on earlier draws, or on the worker that
makes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tidemill.engine.logprobs import TokenLogprobs, token_logprobs
from tidemill.engine.noise import gumbel_noise

GREEDY_BELOW = 1e-6  # a temperature that no draw could tell from greedy, and no division survives


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence draws its tokens. Lengths count from the end of the sequence's prompt."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # least set of likeliest tokens that reaches this mass; 1 = off
    top_k: int = 0  # likeliest tokens kept; 0 = off
    min_p: float = 0.0  # least share of the likeliest token's probability; 0 = off
    seed: int = 0  # 64 bits
    max_tokens: int = 256
    min_tokens: int = 0  # of the completion, relayed ones included, before any stop token
    stop_token_ids: frozenset[int] = frozenset()  # generated, counted, and then the end
    repetition_penalty: float = 1.0  # on tokens of prompt and completion; 1 = off
    presence_penalty: float = 0.0  # on tokens of the completion
    frequency_penalty: float = 0.0  # on tokens of the completion, for each time
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added), each id once
    logprobs: int | None = None  # alternatives beside each token's own; None = none at all
    prompt_logprobs: int | None = None  # the same for the prompt's tokens

    @property
    def is_plain(self) -> bool:
        """Whether logits are drawn from as the model gives them, while no grammar binds."""
        return (
            self.repetition_penalty == 1
            and self.presence_penalty == 0
            and self.frequency_penalty == 0
            and not self.logit_bias
            and self.min_tokens == 0
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token drawn; where a grammar allows none (`dead_end`), `token_id` means nothing."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    dead_end: bool = False


class Constraint(Protocol):
    """What a completion must conform to, beside one sequence."""

    def allowed(self, token_ids: Sequence[int]) -> Tensor | None:
        """Mask [V] of what may follow `token_ids`, the sequence so far; None: everything."""


class Drawable(Protocol):
    """What the sampler needs of a sequence."""

    sampling: SamplingParams
    token_ids: list[int]
    constraint: Constraint | None
    history: "History | None"

    @property
    def num_completion_tokens(self) -> int:
        """Tokens at the end of token_ids that are the completion, relayed ones included."""


class History:
    """How often each token stands in the completion so far, and which ones stand in the prompt."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.prompt_ids = torch.tensor(list(set(prompt)), dtype=torch.long)
        self.counts: dict[int, int] = {}
        self._num_seen = len(prompt)

    def extend_to(self, token_ids: Sequence[int]) -> None:
        """Count what `token_ids`, prompt and completion, has more than the last time."""
        for token_id in token_ids[self._num_seen :]:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
        self._num_seen = len(token_ids)


def draw(logits: Tensor, seqs: Sequence[Drawable]) -> list[Drawn]:
    """logits [B, V], one row a sequence -> each one's next token.

    Rows are drawn one by one: a row fits the CPU's cache, and its arithmetic does not depend on
    how many others there are. A highest value has no arithmetic, so plain greedy goes together.
    """
    logits = logits.float()  # a CPU reduces bf16 rows four times slower
    if all(_takes_the_highest(seq) for seq in seqs):
        return [Drawn(token_id) for token_id in logits.argmax(-1).tolist()]
    return [_draw(row, seq) for row, seq in zip(logits, seqs, strict=True)]


def _takes_the_highest(seq: Drawable) -> bool:
    params = seq.sampling
    return (
        params.temperature < GREEDY_BELOW
        and params.logprobs is None
        and seq.constraint is None
        and params.is_plain
    )


def _draw(logits: Tensor, seq: Drawable) -> Drawn:
    params = seq.sampling
    adjusted: Tensor | None = logits
    if seq.constraint is not None or not params.is_plain:
        adjusted = _adjusted(logits, seq)
    if adjusted is None:
        return Drawn(-1, dead_end=True)
    if params.temperature < GREEDY_BELOW:
        token_id = int(adjusted.argmax())
    else:
        scaled = adjusted.double() / params.temperature
        token_id = _gumbel_max(scaled, params, position=len(seq.token_ids))
    if params.logprobs is None:
        return Drawn(token_id)
    return Drawn(token_id, token_logprobs(logits, token_id, params.logprobs))


def _adjusted(logits: Tensor, seq: Drawable) -> Tensor | None:
    """Penalties, bias and masks over logits [V], in fp64; None where no token is left."""
    params = seq.sampling
    adjusted = logits.double()
    _penalise(adjusted, seq)
    if params.logit_bias:
        ids, bias = zip(*params.logit_bias, strict=True)
        adjusted[torch.tensor(ids)] += torch.tensor(bias, dtype=torch.double)
    if seq.num_completion_tokens < params.min_tokens and params.stop_token_ids:
        stops = [token_id for token_id in params.stop_token_ids if token_id < len(adjusted)]
        adjusted[stops] = -math.inf
    if seq.constraint is not None:
        allowed = seq.constraint.allowed(seq.token_ids)
        if allowed is not None:
            adjusted.masked_fill_(~allowed, -math.inf)
    return None if adjusted.max() == -math.inf else adjusted


def _penalise(logits: Tensor, seq: Drawable) -> None:
    """Repetition as transformers' RepetitionPenaltyLogitsProcessor; the others as OpenAI's."""
    params = seq.sampling
    if not (params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty):
        return
    if seq.history is None:
        seq.history = History(seq.token_ids[: len(seq.token_ids) - seq.num_completion_tokens])
    history = seq.history
    history.extend_to(seq.token_ids)
    ids = torch.tensor(list(history.counts), dtype=torch.long)
    if params.repetition_penalty != 1:
        known = torch.cat([history.prompt_ids, ids])  # one id twice gets the same value twice
        value = logits[known]
        penalty = params.repetition_penalty
        logits[known] = torch.where(value > 0, value / penalty, value * penalty)
    if params.presence_penalty:
        logits[ids] -= params.presence_penalty
    if params.frequency_penalty:
        counts = torch.tensor(list(history.counts.values()), dtype=torch.double)
        logits[ids] -= params.frequency_penalty * counts


def _gumbel_max(scaled: Tensor, params: SamplingParams, position: int) -> int:
    """scaled [V], logits over temperature -> one token id."""
    ids = torch.arange(len(scaled))
    kept = scaled
    if 0 < params.top_k < len(kept):
        keep = kept >= kept.topk(params.top_k).values[-1]
        ids, kept = ids[keep], kept[keep]
    if params.top_p < 1:
        keep = _reaching_mass(kept.softmax(-1), params.top_p)
        ids, kept = ids[keep], kept[keep]
    if params.min_p > 0:
        keep = kept >= kept.max() + math.log(params.min_p)
        ids, kept = ids[keep], kept[keep]
    noise = gumbel_noise(params.seed, position, ids)
    return int(ids[noise.add_(kept).argmax()])


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
