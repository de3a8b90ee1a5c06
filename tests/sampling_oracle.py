"""A slow exact sampler, straight from the definitions, in Python's own integers and floats."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

_64 = (1 << 64) - 1


@dataclass(frozen=True)
class Asked:
    """One draw: the rules, and the tokens so far; `completion` follows `prompt`."""

    prompt: Sequence[int]
    completion: Sequence[int]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    allowed: frozenset[int] | None = None


def adjusted(logits: Sequence[float], asked: Asked) -> list[float]:
    """Penalties, bias and masks, one token at a time."""
    found = []
    for token, raw in enumerate(logits):
        value = raw
        if token in asked.prompt or token in asked.completion:
            if value > 0:
                value = value / asked.repetition_penalty
            else:
                value = value * asked.repetition_penalty
        times = list(asked.completion).count(token)
        if times > 0:
            value -= asked.presence_penalty
        value -= asked.frequency_penalty * times
        value += asked.logit_bias.get(token, 0.0)
        if token in asked.stop_token_ids and len(asked.completion) < asked.min_tokens:
            value = -math.inf
        if asked.allowed is not None and token not in asked.allowed:
            value = -math.inf
        found.append(value)
    return found


def distribution(logits: Sequence[float], asked: Asked) -> list[float]:
    """Probability of each token; temperature above 0."""
    scaled = [value / asked.temperature for value in adjusted(logits, asked)]
    kept = [token for token, value in enumerate(scaled) if value > -math.inf]
    if asked.top_k:
        ranked = sorted((scaled[token] for token in kept), reverse=True)
        least = ranked[min(asked.top_k, len(ranked)) - 1]
        kept = [token for token in kept if scaled[token] >= least]
    if asked.top_p < 1:
        mass = _softmax([scaled[token] for token in kept])
        total, least = 0.0, 0.0
        for share in sorted(mass, reverse=True):
            total, least = total + share, share
            if total >= asked.top_p:
                break
        kept = [token for token, share in zip(kept, mass, strict=True) if share >= least]
    if asked.min_p > 0:
        mass = _softmax([scaled[token] for token in kept])
        floor = asked.min_p * max(mass)
        kept = [token for token, share in zip(kept, mass, strict=True) if share >= floor]
    mass = _softmax([scaled[token] for token in kept])
    chances = [0.0] * len(logits)
    for token, share in zip(kept, mass, strict=True):
        chances[token] = share
    return chances


def drawn(logits: Sequence[float], asked: Asked) -> int | None:
    """The one token that these rules, this seed and this position give; None: none is left."""
    values = adjusted(logits, asked)
    if max(values) == -math.inf:
        return None
    if asked.temperature == 0:
        return values.index(max(values))
    position = len(asked.prompt) + len(asked.completion)
    chances = distribution(logits, asked)
    best, chosen = -math.inf, 0
    for token, chance in enumerate(chances):
        if chance > 0:
            score = values[token] / asked.temperature + gumbel(asked.seed, position, token)
            if score > best:
                best, chosen = score, token
    return chosen


def gumbel(seed: int, position: int, token: int) -> float:
    """SplitMix64 of seed, position and token as 52 bits between 0 and 1, as Gumbel noise."""
    key = _splitmix(_splitmix(seed) ^ position)
    bits = _splitmix((key + token * 0x9E3779B97F4A7C15) & _64)
    uniform = ((bits >> 12) + 0.5) / (1 << 52)
    return -math.log(-math.log(uniform))


def _splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64
    return z ^ (z >> 31)


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]
