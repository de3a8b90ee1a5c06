"""Binds a completion to a grammar: which tokens may follow the ones that are there.

Needs the `xgrammar` package, which is imported with this module and not before.
"""

from collections.abc import Collection, Sequence

import torch
import xgrammar
from torch import Tensor

from tidemill.vocabulary import vocabulary_digest

_OPENING = b"<think>"
_CLOSING = b"</think>"
_TAIL_TOKENS = 8  # "<think>" and a newline, even spelt letter by letter


def tokenizer_info(token_bytes: list[bytes], vocab_size: int) -> xgrammar.TokenizerInfo:
    """The vocabulary as compiler and matchers take it; stop ids are each matcher's own."""
    return xgrammar.TokenizerInfo(
        token_bytes[:vocab_size], xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=[]
    )


class Vocabulary:
    """What the ids of a model's tokens stand for."""

    def __init__(self, token_bytes: list[bytes], size: int) -> None:
        self.size = size
        self.token_bytes = token_bytes[:size]
        self.digest = vocabulary_digest(token_bytes)
        self.info = tokenizer_info(token_bytes, size)
        self._overrunning: dict[bytes, Tensor] = {}

    def text_of(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of ids; special ones and those beyond the tokeniser's have none."""
        return b"".join(self.bytes_of(token_id) for token_id in token_ids)

    def bytes_of(self, token_id: int) -> bytes:
        """Bytes of one id."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""

    def opens_reasoning(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt ends with `<think>`, as `tidemill.text` has it."""
        return self.text_of(prompt[-_TAIL_TOKENS:]).rstrip().endswith(_OPENING)

    def overrunning(self, held: bytes) -> Tensor:
        """Ids [N] that after `held`, a start of `</think>`, would end it and say more at once."""
        if held not in self._overrunning:
            ids = [
                token_id
                for token_id, token in enumerate(self.token_bytes)
                if (held + token).partition(_CLOSING)[2].strip()
            ]
            self._overrunning[held] = torch.tensor(ids, dtype=torch.long)
        return self._overrunning[held]


class Grammar:
    """A compiled grammar; any number of sequences may be bound to it."""

    def __init__(self, vocabulary: Vocabulary, serialised: str) -> None:
        self.vocabulary = vocabulary
        self.compiled = xgrammar.CompiledGrammar.deserialize_json(serialised, vocabulary.info)

    def constraint(
        self, prompt: Sequence[int], *, num_relayed_tokens: int, stop_token_ids: Collection[int]
    ) -> "GrammarConstraint":
        """For one sequence; the last `num_relayed_tokens` of its prompt are completion."""
        return GrammarConstraint(
            self,
            prompt[: len(prompt) - num_relayed_tokens],
            sorted(token_id for token_id in stop_token_ids if token_id < self.vocabulary.size),
        )


class GrammarConstraint:
    """Follows one completion, whose state is rebuilt from its tokens wherever it goes on.

    Where the prompt ends inside `<think>`, the grammar begins after `</think>`, and nothing ends
    the completion before. Stop tokens are allowed where the grammar is complete, and only there.
    """

    def __init__(self, grammar: Grammar, prompt: Sequence[int], stop_ids: list[int]) -> None:
        self._vocabulary = grammar.vocabulary
        self._stop_ids = stop_ids
        self._matcher = xgrammar.GrammarMatcher(
            grammar.compiled,
            override_stop_tokens=stop_ids or None,
            terminate_without_stop_token=not stop_ids,
        )
        self._bitmask = xgrammar.allocate_token_bitmask(1, grammar.vocabulary.size)
        self._num_seen = len(prompt)
        self._reasoning = grammar.vocabulary.opens_reasoning(prompt)
        self._held = b""
        self._lost = False

    def allowed(self, token_ids: Sequence[int]) -> Tensor | None:
        """As `Constraint.allowed`; all False where the tokens so far do not fit the grammar."""
        for token_id in token_ids[self._num_seen :]:
            self._follow(token_id)
        self._num_seen = len(token_ids)
        if self._lost:
            return torch.zeros(self._vocabulary.size, dtype=torch.bool)
        if self._reasoning:
            allowed = torch.ones(self._vocabulary.size, dtype=torch.bool)
            allowed[self._stop_ids] = False
            allowed[self._vocabulary.overrunning(self._held)] = False
            return allowed
        if not self._matcher.fill_next_token_bitmask(self._bitmask):
            return None
        return mask_of(self._bitmask, self._vocabulary.size)

    def _follow(self, token_id: int) -> None:
        if self._lost:
            return
        if not self._reasoning:
            self._lost = not self._matcher.accept_token(token_id)
            return
        text = self._held + self._vocabulary.bytes_of(token_id)
        _, closing, rest = text.partition(_CLOSING)
        if closing:
            self._reasoning = False
            self._lost = bool(rest.strip())
        self._held = _start_of_closing(text)


def _start_of_closing(text: bytes) -> bytes:
    """The longest end of `text` that `</think>` may begin with."""
    longest = min(len(text), len(_CLOSING) - 1)
    ends = (text[-length:] for length in range(longest, 0, -1))
    return next((end for end in ends if _CLOSING.startswith(end)), b"")


def mask_of(bitmask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """bitmask [1, ceil(V / 32)] int32, lowest bit first -> bool [V]."""
    bits = torch.arange(32, dtype=torch.int32)
    return ((bitmask[0].unsqueeze(-1) >> bits) & 1).flatten()[:vocab_size].bool()
