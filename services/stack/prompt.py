"""A long prompt for the demo: documentation that every Python brings along."""

import inspect
import shutil

MAX_CHARS = 1_500  # some 450 tokens: the demo model saw little that was longer
LAST = "If the file does not exist,"


def documentation_prompt() -> str:
    """The documentation of `shutil`'s functions, and a sentence begun."""
    parts: list[str] = []
    for name in shutil.__all__:
        function = getattr(shutil, name)
        if inspect.isfunction(function):
            heading = f"shutil.{name}{inspect.signature(function)}"
            parts += [heading, inspect.getdoc(function) or ""]
    return "\n\n".join(parts)[:MAX_CHARS] + f"\n\n{LAST}"
