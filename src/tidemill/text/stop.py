"""Finds stop strings in streamed text without ever emitting a part of one."""

from collections import deque
from collections.abc import Sequence

from tidemill.errors import InvalidRequest

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256


class StopMatcher:
    """Aho-Corasick over a request's stop strings: constant work per character.

    The first string to be completed counts; of several completed by one character, the longest.
    Text that may yet become a stop string is held back, and no more than that. InvalidRequest
    for more than 16 strings, an empty one, or one of more than 256 characters.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        _require_bounds(stop_strings)
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._match = [""]
        for stop_string in stop_strings:
            self._insert(stop_string)
        self._link()
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """The text that is safe to emit; all text before the stop string once `matched` is set.

        Nothing may be pushed after a match. A stop string that is completed while not `armed` is
        plain text, and no part of a later one.
        """
        assert self.matched is None
        if len(self._next) == 1:
            return text
        seen = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._state = self._step(self._state, character)
            found = self._match[self._state]
            if found and armed:
                self.matched, self._held = found, ""
                return seen[: end - len(found)]
            if found:
                self._state = 0
        safe = len(seen) - self._depth[self._state]
        self._held = seen[safe:]
        return seen[:safe]

    def flush(self) -> str:
        """The held-back text, at the end of the stream."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _insert(self, stop_string: str) -> None:
        state = 0
        for character in stop_string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append("")
            state = self._next[state][character]
        self._match[state] = stop_string

    def _link(self) -> None:
        """Point each state to the longest proper suffix of its text that is a state too."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                self._match[child] = self._match[child] or self._match[self._fallback[child]]
                queue.append(child)


def _require_bounds(stop_strings: Sequence[str]) -> None:
    if len(stop_strings) > MAX_STOP_STRINGS:
        problem = f"{len(stop_strings)} stop strings, at most {MAX_STOP_STRINGS} are allowed"
        raise InvalidRequest(problem, violations=[("stop", problem)])
    for index, stop_string in enumerate(stop_strings):
        if not 1 <= len(stop_string) <= MAX_STOP_CHARS:
            problem = f"has {len(stop_string)} characters, must have 1 to {MAX_STOP_CHARS}"
            field = f"stop[{index}]"
            raise InvalidRequest(f"{field} {problem}", violations=[(field, problem)])
