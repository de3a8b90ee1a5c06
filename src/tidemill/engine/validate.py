"""What the engine refuses, whoever asked: the last check before tokens reach the model."""

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.sampling_rules import sampling_violations
from tidemill.engine.sequence import Sequence
from tidemill.errors import InvalidRequest


def validate(seq: Sequence, *, vocab_size: int, max_context: int) -> None:
    """Raise InvalidRequest with one violation per bad field."""
    violations = _prompt_violations(seq, vocab_size, max_context)
    violations += sampling_violations(seq, vocab_size=vocab_size)
    if not violations:
        violations = _block_violations(seq) + _fork_violations(seq, vocab_size, max_context)
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


def _block_violations(seq: Sequence) -> list[tuple[str, str]]:
    violations: list[tuple[str, str]] = []
    needed = -(-seq.num_prompt_tokens // BLOCK_TOKENS)
    if len(seq.block_table) < needed:
        violations.append(
            ("block_table", f"has {len(seq.block_table)} blocks, {needed} are needed")
        )
    most = seq.num_prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    if seq.sampling.prompt_logprobs is not None:
        most = 0
    if not 0 <= seq.num_cached_tokens <= most:
        violations.append(
            ("num_cached_tokens", f"is {seq.num_cached_tokens}, at most {most} can be reused")
        )
    return violations


def _fork_violations(seq: Sequence, vocab_size: int, max_context: int) -> list[tuple[str, str]]:
    violations: list[tuple[str, str]] = []
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    for fork in seq.forks:
        violations += _prompt_violations(fork, vocab_size, max_context)
        violations += sampling_violations(fork, vocab_size=vocab_size)
        if fork.token_ids[: fork.num_prompt_tokens] != prompt:
            violations.append(("forks", f"{fork.seq_id!r} has another prompt"))
        if fork.block_table or fork.forks:
            violations.append(("forks", f"{fork.seq_id!r} has blocks or forks of its own"))
        if bool(fork.num_generated) != bool(seq.num_generated):
            violations.append(("forks", f"{fork.seq_id!r} lacks a first token, or has one"))
    return violations
