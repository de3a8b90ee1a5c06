"""Choice of the next token: the highest of logit / temperature plus Gumbel noise (Gumbel-max).

The noise is a pure function of (seed, absolute position, token id), and everything else one of the
sequence's own tokens: a draw does not depend on the batch, on earlier draws, or on the worker that
makes it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tidemill.engine.device import send
from tidemill.engine.logprobs import TokenLogprobs, rows_logprobs, token_logprobs
from tidemill.kernels.choice import takes_triton
from tidemill.kernels.sample import GREEDY_BELOW, Adjustments, Draws, gumbel_max, sample


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
        return not self.penalises and not self.logit_bias and self.min_tokens == 0

    @property
    def penalises(self) -> bool:
        """Whether what stands in the sequence changes what may follow."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
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

    On a CPU rows are drawn one by one: a row fits its cache, and its arithmetic does not depend on
    how many others there are. A highest value has no arithmetic, so plain greedy goes together.
    On a GPU all go in one launch.
    """
    if takes_triton(logits):
        return _draw_in_one_launch(logits, seqs)
    logits = logits.float()  # a CPU reduces bf16 rows four times slower
    if all(_takes_the_highest(seq) for seq in seqs):
        return [Drawn(token_id) for token_id in logits.argmax(-1).tolist()]
    return [_draw(row, seq) for row, seq in zip(logits.cpu(), seqs, strict=True)]


def _draw_in_one_launch(logits: Tensor, seqs: Sequence[Drawable]) -> list[Drawn]:
    token_ids = sample(logits, _draws(seqs, logits)).tolist()
    drawn = [Drawn(token_id, dead_end=token_id < 0) for token_id in token_ids]
    told = [
        (at, token_ids[at], seq.sampling.logprobs)
        for at, seq in enumerate(seqs)
        if seq.sampling.logprobs is not None and token_ids[at] >= 0
    ]
    if told:
        rows, ids, tops = zip(*told, strict=True)
        wanted = logits[send(torch.tensor(rows), logits.device)]
        for at, logprobs in zip(rows, rows_logprobs(wanted, ids, tops), strict=True):
            drawn[at] = Drawn(token_ids[at], logprobs)
    return drawn


def _draws(seqs: Sequence[Drawable], logits: Tensor) -> Draws:
    """What the op needs of `seqs`, on the device of their logits [B, V]."""
    params = [seq.sampling for seq in seqs]
    temperature, top_k, top_p, min_p, seeds, positions = _sent(
        logits.device,
        _doubles(each.temperature for each in params),
        torch.tensor([each.top_k for each in params], dtype=torch.int32),
        _doubles(each.top_p for each in params),
        _doubles(each.min_p for each in params),
        torch.tensor([each.seed for each in params], dtype=torch.uint64).view(torch.int64),
        torch.tensor([len(seq.token_ids) for seq in seqs]),
    )
    return Draws(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
        adjustments=_adjustments(seqs, logits),
    )


def _adjustments(seqs: Sequence[Drawable], logits: Tensor) -> Adjustments | None:
    adjusted = [at for at, seq in enumerate(seqs) if seq.constraint or not seq.sampling.is_plain]
    if not adjusted:
        return None
    params = [seqs[at].sampling for at in adjusted]
    places = torch.full((len(seqs),), -1, dtype=torch.int32)
    places[adjusted] = torch.arange(len(adjusted), dtype=torch.int32)
    tables = [_tables(seqs[at], logits.shape[1]) for at in adjusted]
    rows, repetition, presence, frequency, seen, bias = _sent(
        logits.device,
        places,
        _doubles(each.repetition_penalty for each in params),
        _doubles(each.presence_penalty for each in params),
        _doubles(each.frequency_penalty for each in params),
        torch.stack([seen for seen, _ in tables]),
        torch.stack([bias for _, bias in tables]),
    )
    return Adjustments(
        rows=rows,
        repetition=repetition,
        presence=presence,
        frequency=frequency,
        seen=seen,
        bias=bias,
    )


def _doubles(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.double)


def _sent(device: torch.device, *columns: Tensor) -> list[Tensor]:
    """The host's columns on `device` in one transfer, each from a multiple of 16 bytes on."""
    sizes = [-(-column.nbytes // 16) * 16 for column in columns]
    together = torch.empty(sum(sizes), dtype=torch.uint8)
    for place, column in zip(torch.split(together, sizes), columns, strict=True):
        place[: column.nbytes] = column.flatten().view(torch.uint8)
    return [
        place[: column.nbytes].view(column.dtype).view(column.shape)
        for place, column in zip(torch.split(send(together, device), sizes), columns, strict=True)
    ]


def _tables(seq: Drawable, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The sequence's row of `Adjustments.seen` and of `bias`."""
    params = seq.sampling
    seen = torch.zeros(num_tokens, dtype=torch.int32)
    if params.penalises:
        history = _history_of(seq)
        seen[history.prompt_ids] = 1
        ids = torch.tensor(list(history.counts), dtype=torch.long)
        seen[ids] += 2 * torch.tensor(list(history.counts.values()), dtype=torch.int32)
    bias = torch.zeros(num_tokens, dtype=torch.double)
    _bias_and_mask(bias, seq)
    return seen, bias


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
        token_id = gumbel_max(
            scaled,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            position=len(seq.token_ids),
        )
    if params.logprobs is None:
        return Drawn(token_id)
    return Drawn(token_id, token_logprobs(logits, token_id, params.logprobs))


def _adjusted(logits: Tensor, seq: Drawable) -> Tensor | None:
    """Penalties, bias and masks over logits [V], in fp64; None where no token is left."""
    adjusted = logits.double()
    _penalise(adjusted, seq)
    _bias_and_mask(adjusted, seq)
    return None if adjusted.max() == -math.inf else adjusted


def _bias_and_mask(adjusted: Tensor, seq: Drawable) -> None:
    """Add the request's bias to adjusted [V], and -inf where no token is allowed now."""
    params = seq.sampling
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


def _history_of(seq: Drawable) -> History:
    """The sequence's, up to its last token."""
    if seq.history is None:
        seq.history = History(seq.token_ids[: len(seq.token_ids) - seq.num_completion_tokens])
    seq.history.extend_to(seq.token_ids)
    return seq.history


def _penalise(logits: Tensor, seq: Drawable) -> None:
    """Repetition as transformers' RepetitionPenaltyLogitsProcessor; the others as OpenAI's."""
    params = seq.sampling
    if not params.penalises:
        return
    history = _history_of(seq)
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
