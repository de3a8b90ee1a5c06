"""How a request's tokens are drawn: what the client asked for, completed and kept in bounds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from services.router.models import ServedModel
from tidemill.errors import InvalidRequest
from tidemill.text import Tokenizer

MAX_STOP_TOKEN_IDS = 128
MAX_COMPLETION_TOKENS = 1 << 20  # of all choices together, as far as a usage can count
MAX_SCORED_PROMPT_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Sampling as the client put it; None where it left a choice to the router."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1

    def check_ids(self, tokenizer: Tokenizer) -> None:
        """InvalidRequest where an id is no token of the model."""
        if self.stop_token_ids:
            tokenizer.check_ids(self.stop_token_ids, field="sampling.stop_token_ids")
        if self.logit_bias:
            tokenizer.check_ids(tuple(self.logit_bias), field="sampling.logit_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to draw, every default filled in. `max_tokens` and `min_tokens` are of each choice."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1


def resolve(
    wanted: Wanted, model: ServedModel, *, num_prompt_tokens: int, context_tokens: int, seed: int
) -> Sampling:
    """Fill in the model's defaults, and `seed` where the client gave none.

    InvalidRequest names the field that is out of bounds.
    """
    max_tokens = _max_tokens(wanted, model, context_tokens - num_prompt_tokens)
    if wanted.min_tokens > max_tokens:
        _refuse("min_tokens", f"must be at most max_tokens, which is {max_tokens} here")
    if wanted.n * max_tokens > MAX_COMPLETION_TOKENS:
        _refuse("n", f"n times max_tokens must be at most {MAX_COMPLETION_TOKENS}")
    if wanted.prompt_logprobs is not None and num_prompt_tokens > MAX_SCORED_PROMPT_TOKENS:
        _refuse(
            "prompt_logprobs",
            f"the prompt has {num_prompt_tokens} tokens, at most {MAX_SCORED_PROMPT_TOKENS} "
            "can be scored",
        )
    defaults = model.tokenizer.defaults
    return Sampling(
        temperature=_given(wanted.temperature, defaults.temperature),
        top_p=_given(wanted.top_p, defaults.top_p),
        top_k=int(_given(wanted.top_k, defaults.top_k)),
        min_p=_given(wanted.min_p, defaults.min_p),
        repetition_penalty=_given(wanted.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=wanted.logit_bias,
        seed=seed if wanted.seed is None else wanted.seed,
        max_tokens=max_tokens,
        min_tokens=wanted.min_tokens,
        stop_token_ids=_stop_token_ids(wanted, model.tokenizer),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.prompt_logprobs,
        n=wanted.n,
    )


def _max_tokens(wanted: Wanted, model: ServedModel, room: int) -> int:
    """Of each choice; `room` is how many tokens the context leaves."""
    if room < 1:
        raise InvalidRequest(
            "the prompt leaves no room in the model's context",
            reason="CONTEXT_EXCEEDED",
            violations=[("input", f"{1 - room} tokens too long")],
        )
    most = model.config.max_output_tokens
    if wanted.max_tokens is None:
        return min(model.config.default_max_tokens, room)
    if wanted.max_tokens > most:
        _refuse("max_tokens", f"must be at most {most} for this model")
    return min(wanted.max_tokens, room)


def _stop_token_ids(wanted: Wanted, tokenizer: Tokenizer) -> tuple[int, ...]:
    own = frozenset[int]() if wanted.ignore_eos else tokenizer.eos_ids
    ids = tuple(sorted(own | set(wanted.stop_token_ids)))
    if len(ids) > MAX_STOP_TOKEN_IDS:
        _refuse("stop_token_ids", f"more than {MAX_STOP_TOKEN_IDS} with the model's own")
    return ids


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _refuse(name: str, problem: str) -> NoReturn:
    raise InvalidRequest(f"{name}: {problem}", violations=[(f"sampling.{name}", problem)])
