"""Splits a completion into the reasoning between `<think>` and `</think>` and the answer."""

from enum import Enum, auto
from typing import NamedTuple

OPENING = "<think>"
CLOSING = "</think>"


class Split(NamedTuple):
    """New text of either side; either may be empty."""

    reasoning: str
    content: str


class _Side(Enum):
    UNDECIDED = auto()
    REASONING = auto()
    CONTENT = auto()


class ReasoningSplitter:
    """One completion's split, whatever the chunks that it comes in.

    A completion has at most one reasoning block and starts with it: `<think>` counts only as the
    first thing but white space, which then is dropped with it, or not at all where the prompt
    ended with the tag already (`inside`). All after `</think>` is content, to the letter.
    """

    def __init__(self, *, inside: bool = False) -> None:
        self._side = _Side.REASONING if inside else _Side.UNDECIDED
        self._held = ""
        self._num_chars = 0
        self._end = 0

    @property
    def reasoning_end(self) -> int:
        """Characters, tags included, from the start up to the end of reasoning as known so far.

        While reasoning lasts that is all that was pushed; 0 where there is no reasoning.
        """
        return self._num_chars if self._side is _Side.REASONING else self._end

    @property
    def inside(self) -> bool:
        """Whether reasoning has begun and not ended."""
        return self._side is _Side.REASONING

    @property
    def over(self) -> bool:
        """Whether all that is still to come is content."""
        return self._side is _Side.CONTENT

    def push(self, text: str) -> Split:
        """Split what is certain; a possible part of a tag is held back."""
        self._num_chars += len(text)
        text, self._held = self._held + text, ""
        if self._side is _Side.UNDECIDED:
            text = self._open(text)
        if self._side is _Side.REASONING:
            return self._close(text)
        return Split("", text)

    def flush(self) -> Split:
        """What is held back, at the end of the stream, on the side where it stands."""
        held, self._held = self._held, ""
        if self._side is _Side.REASONING:
            return Split(held, "")
        self._side = _Side.CONTENT
        return Split("", held)

    def _open(self, text: str) -> str:
        start = text.lstrip()
        if start.startswith(OPENING):
            self._side = _Side.REASONING
            return start.removeprefix(OPENING)
        if OPENING.startswith(start):
            self._held = text
            return ""
        self._side = _Side.CONTENT
        return text

    def _close(self, text: str) -> Split:
        reasoning, tag, content = text.partition(CLOSING)
        if tag:
            self._side = _Side.CONTENT
            self._end = self._num_chars - len(content)
            return Split(reasoning, content)
        safe = len(text) - _partial_tag(text)
        self._held = text[safe:]
        return Split(text[:safe], "")


def _partial_tag(text: str) -> int:
    """Length of the longest end of `text` that begins a closing tag."""
    longest = min(len(text), len(CLOSING) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(CLOSING[:n])), 0)
