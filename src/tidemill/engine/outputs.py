"""What an engine step reports; the caller routes each by `seq_id`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrefilledOutput:
    """The prompt's latents are complete; a `prefill_only` sequence leaves the engine with this."""

    seq_id: str
    first_token_id: int


@dataclass(frozen=True)
class TokensOutput:
    """New tokens; `first_index` counts the sequence's generated tokens from 0."""

    seq_id: str
    token_ids: list[int]
    first_index: int


@dataclass(frozen=True)
class PausedOutput:
    """The sequence has generated all it is funded for; `Engine.fund` resumes it."""

    seq_id: str


@dataclass(frozen=True)
class FinishedOutput:
    """The engine has dropped the sequence; its blocks remain the caller's to release.

    `num_generated` counts every generated token, also those that a stop string discards;
    `busy_seconds` is the sequence's share of all its steps' wall time.
    """

    seq_id: str
    reason: str
    num_generated: int
    busy_seconds: float


Output = PrefilledOutput | TokensOutput | PausedOutput | FinishedOutput


@dataclass(frozen=True)
class EngineLoad:
    """A consistent glance at the engine; `free_blocks` counts evictable ones too."""

    queued_prefill_tokens: int  # prompt tokens accepted and not yet computed
    running: int  # sequences that decode in the next steps
    waiting: int  # sequences in prefill, paused, or beyond max_batch
    free_blocks: int
    total_blocks: int
