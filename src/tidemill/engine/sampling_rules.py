"""Which sampling parameters the engine takes."""

import math

from tidemill.engine.logprobs import MAX_SCORED_PROMPT_TOKENS, MAX_TOP_LOGPROBS
from tidemill.engine.sampling import SamplingParams
from tidemill.engine.sequence import Sequence


def sampling_violations(seq: Sequence, *, vocab_size: int) -> list[tuple[str, str]]:
    """(field, description) of each parameter of the sequence that is out of its range."""
    params = seq.sampling
    return (
        _number_violations(params)
        + _length_violations(seq)
        + _bias_violations(params, vocab_size)
        + _logprob_violations(seq)
    )


def _number_violations(params: SamplingParams) -> list[tuple[str, str]]:
    must = {
        "temperature": (
            math.isfinite(params.temperature) and params.temperature >= 0,
            "a finite number of at least 0",
        ),
        "top_p": (0 < params.top_p <= 1, "in (0, 1]"),
        "top_k": (params.top_k >= 0, "at least 0"),
        "min_p": (0 <= params.min_p <= 1, "in [0, 1]"),
        "repetition_penalty": (
            math.isfinite(params.repetition_penalty) and params.repetition_penalty > 0,
            "a finite number above 0",
        ),
        "presence_penalty": (math.isfinite(params.presence_penalty), "a finite number"),
        "frequency_penalty": (math.isfinite(params.frequency_penalty), "a finite number"),
        "seed": (0 <= params.seed < 1 << 64, "64 bits"),
    }
    return [
        (f"sampling.{name}", f"is {getattr(params, name)}, expected {expected}")
        for name, (holds, expected) in must.items()
        if not holds
    ]


def _length_violations(seq: Sequence) -> list[tuple[str, str]]:
    params = seq.sampling
    most = params.max_tokens + seq.num_relayed_tokens
    if seq.prefill_only:  # its max_tokens is its own, the completion's is elsewhere
        most = max(most, params.min_tokens)
    violations: list[tuple[str, str]] = []
    if params.max_tokens < 1:
        violations.append(("sampling.max_tokens", f"is {params.max_tokens}, expected at least 1"))
    elif not 0 <= params.min_tokens <= most:
        violations.append(
            ("sampling.min_tokens", f"is {params.min_tokens}, expected 0 to max_tokens, {most}")
        )
    if seq.num_relayed_tokens and not 0 < seq.num_relayed_tokens < seq.num_prompt_tokens:
        violations.append(
            ("num_relayed_tokens", f"is {seq.num_relayed_tokens}, expected fewer than the prompt")
        )
    return violations


def _bias_violations(params: SamplingParams, vocab_size: int) -> list[tuple[str, str]]:
    ids = [token_id for token_id, _ in params.logit_bias]
    unknown = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if unknown is not None:
        problem = f"token id {unknown} is outside the vocabulary of {vocab_size}"
        return [("sampling.logit_bias", problem)]
    if len(set(ids)) < len(ids):
        return [("sampling.logit_bias", "names a token id twice")]
    if not all(math.isfinite(bias) for _, bias in params.logit_bias):
        return [("sampling.logit_bias", "holds a value that is no finite number")]
    return []


def _logprob_violations(seq: Sequence) -> list[tuple[str, str]]:
    violations = [
        (f"sampling.{name}", f"is {top}, expected 0 to {MAX_TOP_LOGPROBS}")
        for name in ("logprobs", "prompt_logprobs")
        if (top := getattr(seq.sampling, name)) is not None and not 0 <= top <= MAX_TOP_LOGPROBS
    ]
    if (
        seq.sampling.prompt_logprobs is not None
        and seq.num_prompt_tokens > MAX_SCORED_PROMPT_TOKENS
    ):
        problem = f"scores prompts of up to {MAX_SCORED_PROMPT_TOKENS} tokens"
        violations.append(
            ("sampling.prompt_logprobs", f"{problem}, this one has {seq.num_prompt_tokens}")
        )
    return violations
