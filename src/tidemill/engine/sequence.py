"""One request inside the engine."""

from collections.abc import Callable
from collections.abc import Sequence as Tokens
from enum import Enum

from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine.logprobs import TokenLogprobs
from tidemill.engine.sampling import Constraint, History, SamplingParams

# Called on the engine thread with (layer, start, end) as soon as the layer's latents for positions
# [start, end) of a prefill chunk are in the pool; must not block.
OnLayer = Callable[[int, int, int], None]


class FinishReason(Enum):
    """Why a sequence ended; `Engine.stop` may carry any other string."""

    STOP = "stop"  # a stop token was generated
    LENGTH = "length"  # max_tokens, or the context is full
    BUDGET = "budget"  # stayed paused without funds; the worker decides
    CANCELLED = "cancelled"
    DEAD_END = "dead_end"  # the constraint allows no token


class Sequence:
    """Prompt, generated tokens and where their latents lie.

    `block_table` is what the caller has allocated: at least 64-token blocks for the prompt. From
    submission to the sequence's last output it belongs to the engine, which grows it block by block
    and empties it while the sequence is swapped out; what it holds after that is the caller's to
    release. `num_cached_tokens` prompt tokens are already in these blocks (reused): their latents
    are never written again. They are not computed either, but for the last token of a prompt that
    is there whole: its logits are wanted. With `first_token_id` the whole prompt is computed: the
    sequence was prefilled elsewhere and that token is the first generated one. The last
    `num_relayed_tokens` of the prompt are completion that earlier attempts have generated.
    `constraint` is this sequence's own.

    With `root`, the hash that the prompt's chain hangs on, the engine commits every full block that
    it computes: the first `num_committed` blocks are findable under `block_hashes`. What precedes
    submission is the caller's to commit.

    `prefill_ns` and `decode_ns` are its shares of the time of the steps that computed its prompt,
    and its tokens after the first. Each stands still once the engine has reported the last of them.

    `forks` are further completions of the same prompt: sequences with an empty table, their own
    sampling and, if the prompt was prefilled elsewhere, their own first token. They are submitted
    with this one, share its prompt's blocks, and end one by one. Of a `prefill_only` sequence they
    only draw their first tokens.
    """

    def __init__(
        self,
        seq_id: str,
        prompt: Tokens[int],
        *,
        block_table: Tokens[int] = (),
        sampling: SamplingParams,
        num_cached_tokens: int = 0,
        num_relayed_tokens: int = 0,
        first_token_id: int | None = None,
        num_funded_tokens: int | None = None,
        prefill_only: bool = False,
        on_layer: OnLayer | None = None,
        constraint: Constraint | None = None,
        root: bytes | None = None,
        forks: "Tokens[Sequence]" = (),
    ) -> None:
        self.seq_id = seq_id
        self.token_ids = list(prompt)
        self.num_prompt_tokens = len(self.token_ids)
        self.num_cached_tokens = num_cached_tokens
        self.num_relayed_tokens = num_relayed_tokens
        self.num_computed_tokens = min(num_cached_tokens, self.num_prompt_tokens - 1)
        self.block_table = list(block_table)
        self.sampling = sampling
        self.num_funded_tokens = num_funded_tokens
        self.prefill_only = prefill_only
        self.on_layer = on_layer
        self.constraint = constraint
        self.root = root
        self.forks = list(forks)
        self.number = 0  # in order of submission; the engine's
        self.block_hashes: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.history: History | None = None
        self.finish_reason: FinishReason | None = None
        self.keep_tokens: int | None = None
        self.prefill_ns = 0
        self.decode_ns = 0
        if first_token_id is not None:
            self.token_ids.append(first_token_id)
            self.num_computed_tokens = self.num_prompt_tokens
        self.num_committed = max(self.num_computed_tokens, num_cached_tokens) // BLOCK_TOKENS

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt, a first token handed over included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the completion, those that earlier attempts relayed included."""
        return self.num_generated + self.num_relayed_tokens

    @property
    def num_uncomputed_prompt_tokens(self) -> int:
        """Prompt tokens whose latents are not in the pool yet."""
        return max(self.num_prompt_tokens - self.num_computed_tokens, 0)

    @property
    def is_funded(self) -> bool:
        """Whether one more token may be generated."""
        return self.num_funded_tokens is None or self.num_generated < self.num_funded_tokens

    def slot(self, position: int) -> int:
        """Row of the pool (block * 64 + offset) that holds `position`."""
        block, offset = divmod(position, BLOCK_TOKENS)
        return self.block_table[block] * BLOCK_TOKENS + offset

    def append(self, token_id: int, max_context: int) -> None:
        """Add a generated token and decide whether it is the last."""
        self.token_ids.append(token_id)
        self.finish_reason = self.reason_to_finish(max_context)

    def reason_to_finish(self, max_context: int) -> FinishReason | None:
        """Why the last generated token ends the sequence, if it does."""
        if self.token_ids[-1] in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_generated >= self.sampling.max_tokens or len(self.token_ids) >= max_context:
            return FinishReason.LENGTH
        return None
