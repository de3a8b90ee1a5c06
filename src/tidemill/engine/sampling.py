"""Choice of the next token: the highest of logit / temperature plus Gumbel noise (Gumbel-max).

The noise is a pure function of (seed, absolute position, token id), so a draw does not depend on
the batch, on earlier draws, or on the worker that makes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How one sequence draws its tokens."""

    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # least set of likeliest tokens that reaches this mass; 1 = off
    top_k: int = 0  # likeliest tokens kept; 0 = off
    seed: int = 0  # 64 bits
    max_tokens: int = 256
    stop_token_ids: frozenset[int] = frozenset()  # generated, counted, and then the end


def sample(
    logits: Tensor, sampling: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """logits [B, V] -> B token ids; positions [B] are the absolute positions that they will take.

    Rows are drawn one by one: a row fits the CPU's cache, and its arithmetic does not depend on
    how many others there are.
    """
    logits = logits.float()  # a CPU reduces bf16 rows four times slower
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, (params, position) in enumerate(zip(sampling, positions, strict=True)):
        if params.temperature > 0:
            tokens[row] = _draw(logits[row].double() / params.temperature, params, position)
    return tokens


def gumbel_noise(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64 for each of token_ids [N] at one position of one sequence."""
    key = _signed(_mix(_mix(seed) ^ position))
    bits = _mix_in_place((token_ids + 1).mul_(_signed(_GOLDEN)).add_(key))
    uniform = _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)  # exact, never 0 or 1
    return uniform.log_().neg_().log_().neg_()


def _draw(scaled: Tensor, params: SamplingParams, position: int) -> int:
    """scaled [V], logits over temperature -> one token id."""
    ids = torch.arange(len(scaled))
    if 0 < params.top_k < len(scaled):
        ids = ids[scaled >= scaled.topk(params.top_k).values[-1]]
    if params.top_p < 1:
        ids = ids[_reaching_mass(scaled[ids].softmax(-1), params.top_p)]
    noise = gumbel_noise(params.seed, position, ids)
    return int(ids[noise.add_(scaled[ids]).argmax()])


def _reaching_mass(probabilities: Tensor, top_p: float) -> Tensor:
    """Mask [N] of the likeliest tokens up to the one that reaches mass top_p; ties with it stay."""
    count = min(_LIKELIEST, len(probabilities))
    ordered = probabilities.topk(count).values
    if ordered.sum() < top_p:
        ordered = probabilities.sort(descending=True).values
    last = int((ordered.cumsum(-1) < top_p).sum().clamp(max=len(ordered) - 1))
    return probabilities >= ordered[last]


# Sorting a whole vocabulary costs milliseconds, and a trained model's mass lies in few tokens.
_LIKELIEST = 1024

# SplitMix64 (Steele, Lea, Flood 2014): a counter stepped by the golden gamma, then a mix of bits.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _MIX_A) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_B) & _MASK64
    return value ^ (value >> 31)


def _mix_in_place(value: Tensor) -> Tensor:
    """As `_mix` without its step, on int64, whose products wrap as unsigned ones do."""
    value.bitwise_xor_(_shift_right(value, 30)).mul_(_signed(_MIX_A))
    value.bitwise_xor_(_shift_right(value, 27)).mul_(_signed(_MIX_B))
    return value.bitwise_xor_(_shift_right(value, 31))


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's int64 shift copies the sign."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
