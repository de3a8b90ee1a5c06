"""The engine's own thread, and the event loop's view of what it computes."""

import asyncio
import logging
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tidemill.engine import (
    BusyTime,
    Engine,
    FinishedOutput,
    Output,
    PrefilledOutput,
    Sequence,
)
from tidemill.errors import Internal
from tidemill.worker.pace import Pace

STARVED_S = 0.005


@dataclass(frozen=True)
class Hours:
    """What an engine's time went into since its thread was made; nanoseconds that only grow.

    A step counts once it has ended, as busy if it computed something.
    """

    busy: BusyTime
    uptime_ns: int

    @property
    def idle_ns(self) -> int:
        """What was not busy."""
        return self.uptime_ns - self.busy.total_ns


logger = logging.getLogger(__name__)

OnOutput = Callable[[Output | Internal], None]


@dataclass(frozen=True)
class Running:
    """A submitted sequence as the event loop sees it.

    `on_output` is called on the event loop with each output in order; with Internal, as the last,
    if the engine has failed. It must not raise.
    """

    seq: Sequence
    on_output: OnOutput
    thread: "EngineThread"

    def fund(self, total: int) -> None:
        """Allow `total` generated tokens in all."""
        self.thread.fund(self.seq.seq_id, total)

    def stop(self, reason: str, keep_tokens: int | None = None) -> None:
        """End the sequence between two steps; FinishedOutput follows unless it has ended."""
        self.thread.stop(self.seq.seq_id, reason, keep_tokens)


class EngineThread:
    """Runs `engine.step` while there is work and routes each output to its sequence.

    Use as a context manager inside a running event loop. If a step raises, every sequence gets
    Internal, `failure` says what happened, and the engine computes no more: the process is to be
    replaced.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.pace = pace or Pace(engine, on_decode_step=lambda _: None)
        self.failure: Internal | None = None
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, Running] = {}
        self._wake = threading.Event()
        self._closing = False
        self._began_ns = time.perf_counter_ns()
        self._step_started: float | None = None
        self.num_steps = 0  # begun
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "EngineThread":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join()

    @property
    def step_age_s(self) -> float:
        """Seconds since the step that runs now began; 0 between steps and when idle."""
        started = self._step_started
        return 0.0 if started is None else max(self._clock() - started, 0.0)

    @property
    def hours(self) -> Hours:
        """Until now."""
        busy = self.engine.busy  # first, so that it is never more than the uptime
        return Hours(busy, time.perf_counter_ns() - self._began_ns)

    def where(self) -> str:
        """The engine thread's innermost calls right now, a line each."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = traceback.extract_stack(frame)[-8:] if frame is not None else []
        return "\n".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack)

    @property
    def num_sequences(self) -> int:
        """Sequences submitted and not ended."""
        return len(self._running)

    def submit(self, seq: Sequence, on_output: OnOutput) -> Running:
        """Hand a sequence and its forks to the engine, whose outputs all go to `on_output`.

        Raises as Engine.submit does, Internal after a failure.
        """
        if self.failure is not None:
            raise self.failure
        self.engine.submit(seq)
        for each in [seq] if seq.prefill_only else [seq, *seq.forks]:
            self._running[each.seq_id] = Running(each, on_output, self)
        self._wake.set()
        return self._running[seq.seq_id]

    def fund(self, seq_id: str, total: int) -> None:
        """As Engine.fund."""
        self.engine.fund(seq_id, total)
        self._wake.set()

    def stop(self, seq_id: str, reason: str, keep_tokens: int | None = None) -> None:
        """As Engine.stop."""
        self.engine.stop(seq_id, reason, keep_tokens)
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closing:
                return
            try:
                while self.engine.has_work and not self._closing:
                    self._step()
                    if self.engine.starved:  # others hold the blocks; nobody tells when they leave
                        self._wake.wait(STARVED_S)
                        self._wake.clear()
            except Exception as error:  # whatever a step raises ends the engine, told to all
                self._step_started = None
                self._post(self._fail, error)
                return

    def _step(self) -> None:
        self.num_steps += 1
        self._step_started = self._clock()
        began = time.perf_counter()
        outputs = self.engine.step()
        ended = time.perf_counter()
        self._step_started = None
        step = self.engine.current_step
        if step and self.num_steps > 1:  # the first pays for what no other does
            self.pace.took(step, self.engine.current_costs, ended - began, now=ended)
        if outputs:
            self._post(self._deliver, outputs)

    def _post(self, call: Callable[..., None], argument: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, argument)
        except RuntimeError:
            logger.info("engine output after the event loop closed")

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            running = self._running.get(output.seq_id)
            if running is None:
                continue
            ended = isinstance(output, FinishedOutput) or (
                isinstance(output, PrefilledOutput) and running.seq.prefill_only
            )
            if ended:
                del self._running[output.seq_id]
            running.on_output(output)

    def _fail(self, error: Exception) -> None:
        error_id = uuid.uuid4().hex
        logger.critical(
            "the engine failed and computes no more", extra={"error_id": error_id}, exc_info=error
        )
        self.failure = Internal("the worker's engine failed", error_id=error_id)
        for running in list(self._running.values()):
            running.on_output(self.failure)
        self._running.clear()
