"""Token ids of one completion to the text that the client gets, with exact token counts."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from tidemill.text.detokenizer import Detokenizer
from tidemill.text.reasoning import ReasoningSplitter, Split
from tidemill.text.stop import StopMatcher
from tidemill.text.tokenizer import Tokenizer


class Delta(NamedTuple):
    """What one push added.

    `token_ids` are those of the push that belong to the completion. Their text may follow in a
    later delta, while it may yet be part of a stop string, a tag or a character.
    """

    content: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    stopped: bool = False

    @property
    def num_tokens(self) -> int:
        """Billed tokens of this push."""
        return len(self.token_ids)

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.token_ids or self.stopped)


class TextStream:
    """Detokenises, applies stop strings, then splits off reasoning.

    The billed completion ends with the token that completes a stop string, of which no text is
    emitted, and a stop string does not end it before it has `min_tokens`. `inside`: the prompt
    ended with `<think>`. Without `reasoning`, tags are plain text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        reasoning: bool = False,
        inside: bool = False,
    ) -> None:
        self._min_tokens = min_tokens
        self._detokenizer = Detokenizer(tokenizer.token_bytes)
        self._stops = StopMatcher(stop_strings)
        self._has_stops = bool(stop_strings)
        self._splitter = ReasoningSplitter(inside=inside) if reasoning else None
        self._token_starts: list[int] = []  # while it may matter which of them are reasoning
        self._num_chars = 0
        self._num_tokens = 0
        self._finished = False
        self.num_overrun = 0

    @property
    def num_tokens(self) -> int:
        """Billed tokens so far."""
        return self._num_tokens

    @property
    def num_reasoning_tokens(self) -> int:
        """Those of the billed tokens that start before the end of `</think>`, tags included.

        Never falls; final after `finish`.
        """
        if self._splitter is None:
            return 0
        if self._finished and self._splitter.inside:
            return self.num_tokens
        return bisect_left(self._token_starts, self._splitter.reasoning_end)

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the completion."""
        return self._stops.matched

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the completion."""
        return self._stops.matched is not None

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Add generated tokens; those after the end count as `num_overrun` and no more."""
        assert not self._finished
        if not self._has_stops and (self._splitter is None or self._splitter.over):
            self._num_tokens += len(token_ids)
            return Delta(self._detokenizer.push_all(token_ids), "", tuple(token_ids))
        parts: list[Split] = []
        num_before = self.num_tokens
        for token_id in token_ids:
            if self.stopped:
                break
            self._token_starts.append(self._num_chars)
            self._num_tokens += 1
            parts.append(self._emit(self._detokenizer.push(token_id)))
        num_billed = self.num_tokens - num_before
        self.num_overrun += len(token_ids) - num_billed
        return self._delta(parts, tuple(token_ids[:num_billed]))

    def finish(self) -> Delta:
        """What is still held back. Call it once, whatever ended the completion."""
        parts: list[Split] = []
        if not self.stopped:
            parts.append(self._emit(self._detokenizer.finish()))
        parts.append(self._split(self._stops.flush()))
        if self._splitter is not None:
            parts.append(self._splitter.flush())
        self._finished = True
        return self._delta(parts, ())

    def _emit(self, text: str) -> Split:
        self._num_chars += len(text)
        return self._split(self._stops.push(text, armed=self.num_tokens >= self._min_tokens))

    def _split(self, text: str) -> Split:
        return Split("", text) if self._splitter is None else self._splitter.push(text)

    def _delta(self, parts: list[Split], token_ids: tuple[int, ...]) -> Delta:
        return Delta(
            content="".join(part.content for part in parts),
            reasoning="".join(part.reasoning for part in parts),
            token_ids=token_ids,
            stopped=self.stopped,
        )
