"""Tells of a step that does not end: which one, what it computes, and where it stands."""

import asyncio
import logging

from tidemill.worker.engine_thread import EngineThread

LONGEST_PERIOD_S = 1.0

logger = logging.getLogger(__name__)


class Watchdog:
    """Logs a step older than `stall_s` once, and once more when it has ended after all.

    Readiness looks at the step's age by itself; this is for whoever asks why.
    """

    def __init__(self, thread: EngineThread, *, stall_s: float) -> None:
        self._thread = thread
        self._stall_s = stall_s
        self._stuck: int | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(min(self._stall_s / 4, LONGEST_PERIOD_S))
            self.look()

    def look(self) -> None:
        """Compare the running step with the last one that was stuck."""
        number, age_s = self._thread.num_steps, self._thread.step_age_s
        if self._stuck is not None and (number != self._stuck or age_s == 0):
            logger.warning("the stuck step has ended", extra={"step": self._stuck})
            self._stuck = None
        if self._stuck is None and age_s > self._stall_s:
            self._stuck = number
            step = self._thread.engine.current_step
            logger.error(
                "a step is stuck",
                extra={
                    "step": number,
                    "age_s": round(age_s, 1),
                    "decodes": len(step.decodes),
                    "prompt_tokens": step.num_tokens - len(step.decodes),
                    "longest_context": step.longest_context,
                    "sequences": step.seq_ids[:16],
                    "where": self._thread.where(),
                },
            )
