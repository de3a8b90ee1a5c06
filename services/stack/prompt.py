"""A long prompt for the demo: documentation that every Python brings along."""

import inspect
import statistics

MAX_CHARS = 5_000
LAST = statistics.variance


def documentation_prompt() -> str:
    """The documentation of `statistics`, up to the heading of a function yet to be described."""
    parts = ["# statistics", inspect.getdoc(statistics) or ""]
    num_chars = sum(map(len, parts))
    for name in statistics.__all__:
        function = getattr(statistics, name)
        doc = inspect.getdoc(function) or ""
        if not inspect.isfunction(function) or function is LAST:
            continue
        if num_chars + len(doc) > MAX_CHARS:
            break
        parts += [_heading(name), doc]
        num_chars += len(doc)
    return "\n\n".join([*parts, _heading(LAST.__name__)]) + "\n\n"


def _heading(name: str) -> str:
    return f"statistics.{name}{inspect.signature(getattr(statistics, name))}"
