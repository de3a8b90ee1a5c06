"""Log lines while a model loads: minutes pass before a worker answers, and nobody should guess."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

STEP = 0.1  # of all bytes between two lines
LEAST_SECONDS = 1.0  # between two lines


class LoadProgress:
    """Call it with (bytes read, bytes to read): logs each tenth, at most one line a second.

    The last line, when everything is read, always comes.
    """

    def __init__(self, model_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._model_dir = model_dir
        self._clock = clock
        self._started = self._last = clock()
        self._share = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` bytes are read."""
        now, share = self._clock(), done / max(total, 1)
        due = share - self._share >= STEP and now - self._last >= LEAST_SECONDS
        if not due and done < total:
            return
        self._last, self._share = now, share
        logger.info(
            "loading %s: %.0f of %.0f MB in %.0f s",
            self._model_dir,
            done / 1e6,
            total / 1e6,
            now - self._started,
        )
