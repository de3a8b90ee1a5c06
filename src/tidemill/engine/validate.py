"""What the engine refuses, whoever asked: the last check before tokens reach the model."""

import math

from tidemill.blocks import max_hit_tokens
from tidemill.engine.sampling import SamplingParams
from tidemill.engine.sequence import Sequence
from tidemill.errors import InvalidRequest


def validate(seq: Sequence, *, vocab_size: int, max_context: int) -> None:
    """Raise InvalidRequest with one violation per bad field."""
    violations = _prompt_violations(seq, vocab_size, max_context) + _sampling_violations(
        seq.sampling
    )
    if not violations:
        violations = _block_violations(seq, max_context)
    if violations:
        summary = "; ".join(f"{field}: {description}" for field, description in violations)
        raise InvalidRequest(summary, violations=violations)


def _prompt_violations(seq: Sequence, vocab_size: int, max_context: int) -> list[tuple[str, str]]:
    violations: list[tuple[str, str]] = []
    if seq.num_prompt_tokens == 0:
        violations.append(("prompt", "is empty"))
    if seq.num_prompt_tokens >= max_context:
        violations.append(
            (
                "prompt",
                f"has {seq.num_prompt_tokens} tokens, the context of {max_context} "
                f"leaves room for {max_context - 1}",
            )
        )
    unknown = next((token for token in seq.token_ids if not 0 <= token < vocab_size), None)
    if unknown is not None:
        violations.append(
            ("prompt", f"token id {unknown} is outside the vocabulary of {vocab_size}")
        )
    if seq.num_funded_tokens is not None and seq.num_funded_tokens < 1:
        violations.append(("num_funded_tokens", f"is {seq.num_funded_tokens}, expected at least 1"))
    return violations


def _sampling_violations(sampling: SamplingParams) -> list[tuple[str, str]]:
    must = {
        "temperature": (
            math.isfinite(sampling.temperature) and sampling.temperature >= 0,
            "a finite number of at least 0",
        ),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
        "top_k": (sampling.top_k >= 0, "at least 0"),
        "max_tokens": (sampling.max_tokens >= 1, "at least 1"),
    }
    return [
        (f"sampling.{name}", f"is {getattr(sampling, name)}, expected {expected}")
        for name, (holds, expected) in must.items()
        if not holds
    ]


def _block_violations(seq: Sequence, max_context: int) -> list[tuple[str, str]]:
    violations: list[tuple[str, str]] = []
    needed = seq.num_blocks_needed(max_context)
    if len(seq.block_table) < needed:
        violations.append(
            ("block_table", f"has {len(seq.block_table)} blocks, {needed} are needed")
        )
    if not 0 <= seq.num_cached_tokens <= max_hit_tokens(seq.num_prompt_tokens):
        violations.append(
            (
                "num_cached_tokens",
                f"is {seq.num_cached_tokens}, "
                f"at most {max_hit_tokens(seq.num_prompt_tokens)} can be reused",
            )
        )
    return violations
