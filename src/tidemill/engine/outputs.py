"""What an engine step reports; the caller routes each by `seq_id`."""

from dataclasses import dataclass, field

from tidemill.engine.logprobs import TokenLogprobs
from tidemill.engine.sampling import Drawn


@dataclass(frozen=True)
class PrefilledOutput:
    """The prompt's latents are complete; a `prefill_only` sequence leaves the engine with this."""

    seq_id: str
    first_tokens: list[Drawn]  # one a choice
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # from the second token on

    @property
    def first_token_id(self) -> int:
        """Of the first choice."""
        return self.first_tokens[0].token_id


@dataclass(frozen=True)
class TokensOutput:
    """New tokens; `first_index` counts the sequence's generated tokens from 0.

    `logprobs` has one entry a token, or none at all.
    """

    seq_id: str
    token_ids: list[int]
    first_index: int
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class PausedOutput:
    """The sequence has generated all it is funded for; `Engine.fund` resumes it."""

    seq_id: str


@dataclass(frozen=True)
class FinishedOutput:
    """The engine has dropped the sequence; its blocks remain the caller's to release.

    `num_generated` counts every generated token, also those that a stop string discards.
    """

    seq_id: str
    reason: str
    num_generated: int


Output = PrefilledOutput | TokensOutput | PausedOutput | FinishedOutput


@dataclass(frozen=True)
class EngineLoad:
    """A consistent glance at the engine; `free_blocks` counts evictable ones too."""

    queued_prefill_tokens: int  # prompt tokens accepted and not yet computed
    running: int  # sequences that decode in the next steps
    waiting: int  # sequences in prefill, paused, or beyond max_batch; not those swapped
    free_blocks: int
    total_blocks: int
    swapped: int = 0  # sequences whose latents the device had no room for
