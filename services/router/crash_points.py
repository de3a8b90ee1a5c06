"""Places where a test may have this process die as if by a power cut.

Each is named where it stands in the code. The environment variable TIDEMILL_CRASH_AT names one,
as "point", or "point:N" for its N-th passage, or as "@path" a file that may say so, later too;
without it they do nothing.
"""

import os
import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path

VARIABLE = "TIDEMILL_CRASH_AT"

POINTS = frozenset(
    {
        "hold.before",
        "hold.after",
        "fund.before",
        "fund.after",
        "prefill_done",
        "settle.intent",
        "settle.before",
        "settle.after",
        "spool.before_fsync",
        "spool.after_fsync",
        "replay.before",
        "replay.after",
        "takeover.after",
        "orphan.after",
        "resolve.before",
        "resolve.after",
        "ack.before",
    }
)

_passages: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here by SIGKILL, if the environment says so. ValueError for an unknown name."""
    if name not in POINTS:
        raise ValueError(f"there is no crash point {name!r}")
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    if wanted.startswith("@"):
        wanted = _read(Path(wanted[1:]))
    point, _, passage = wanted.partition(":")
    if point != name:
        return
    _passages[wanted] += 1
    if _passages[wanted] == int(passage or "1"):
        os.kill(os.getpid(), signal.SIGKILL)


def _read(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return ""
