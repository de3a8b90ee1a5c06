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
    """logits [B, V]; positions [B] are the absolute positions that the tokens will take."""
    logits = logits.float()  # a CPU reduces bf16 rows four times slower
    tokens = logits.argmax(-1)
    drawn = [row for row, params in enumerate(sampling) if params.temperature > 0]
    if drawn:
        chosen = [sampling[row] for row in drawn]
        temperature = torch.tensor([[params.temperature] for params in chosen], dtype=torch.float64)
        scaled = logits[drawn].double() / temperature
        _mask_top_k(scaled, [params.top_k for params in chosen])
        _mask_top_p(scaled, [params.top_p for params in chosen])
        scaled += gumbel_noise(
            [params.seed for params in chosen], [positions[row] for row in drawn], logits.shape[-1]
        )
        tokens[drawn] = scaled.argmax(-1)
    result: list[int] = tokens.tolist()
    return result


def gumbel_noise(seeds: Sequence[int], positions: Sequence[int], vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, V] in fp64, row b from (seeds[b], positions[b])."""
    keys = [
        _signed(_mix(_mix(seed) ^ position))
        for seed, position in zip(seeds, positions, strict=True)
    ]
    counters = torch.arange(1, vocab_size + 1) * _signed(_GOLDEN)
    bits = _mix_tensor(torch.tensor(keys).unsqueeze(1) + counters)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # exact, never 0 or 1
    return -(-uniform.log()).log()


def _mask_top_k(scaled: Tensor, top_k: Sequence[int]) -> None:
    """Set all but each row's k highest to -inf, in place; ties with the k-th stay."""
    for row, k in enumerate(top_k):
        if 0 < k < scaled.shape[-1]:
            least = scaled[row].topk(k).values[-1]
            scaled[row].masked_fill_(scaled[row] < least, float("-inf"))


def _mask_top_p(scaled: Tensor, top_p: Sequence[float]) -> None:
    """Set all but each row's likeliest tokens up to and over mass p to -inf, in place."""
    for row, p in enumerate(top_p):
        if p < 1:
            ordered, order = scaled[row].softmax(-1).sort(descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= p
            beyond[0] = False
            scaled[row, order[beyond]] = float("-inf")


# SplitMix64 (Steele, Lea, Flood 2014): a counter stepped by the golden gamma, then a mix of bits.
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _MIX_A) & _MASK64
    value = ((value ^ (value >> 27)) * _MIX_B) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(_MIX_A)
    value = (value ^ _shift_right(value, 27)) * _signed(_MIX_B)
    return value ^ _shift_right(value, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's int64 shift copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
