"""Prefill for other workers: admission, the job that computes, and its hand-over."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, PrefillDone, WorkerTask
from tidemill.api.common.v1.usage_pb2 import PREFILL_SITE_PREFILL_WORKER
from tidemill.blocks import BLOCK_TOKENS
from tidemill.engine import FinishedOutput, FinishReason, Output, PrefilledOutput, Sequence
from tidemill.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidRequest,
    PoolExhausted,
    PrefillFull,
)
from tidemill.kv.handover import Handover, HandoverState
from tidemill.worker.choices import dead_end
from tidemill.worker.engine_thread import Running
from tidemill.worker.prompt import Prompt, PromptBlocks
from tidemill.worker.task import (
    AttemptKey,
    attempt_key,
    microseconds,
    prefill_done,
    sequence_of,
)
from tidemill.worker.worker import Worker

if TYPE_CHECKING:  # it imports xgrammar, which only workers that follow grammars pay for
    from tidemill.engine.grammar import Grammar


@dataclass(frozen=True)
class PrefillTask:
    """One attempt's prefill as asked: the task, and the tokens that the asker holds already."""

    task: WorkerTask
    held_tokens: int

    @property
    def key(self) -> AttemptKey:
        """Names the attempt."""
        return attempt_key(self.task.id)


class Prefiller:
    """The prefills of one worker that are under way, by attempt."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._jobs: dict[AttemptKey, PrefillJob] = {}

    async def admit(self, wanted: PrefillTask, layout_fingerprint: bytes) -> "PrefillJob":
        """Find room and begin.

        Raises FailedPrecondition (KV_LAYOUT_MISMATCH, MODEL_MISMATCH), PrefillFull, AlreadyExists
        while the same attempt is in prefill, InvalidRequest, and what `Grammars.of` raises.
        """
        worker = self._worker
        worker.check_model(wanted.task)
        if layout_fingerprint != worker.engine.layout.fingerprint():
            raise FailedPrecondition(
                "the workers' KV layouts differ: dtype, shape or model", reason="KV_LAYOUT_MISMATCH"
            )
        if wanted.held_tokens > len(wanted.task.token_ids):
            raise InvalidRequest(
                "held_tokens exceeds the prompt",
                violations=[("held_tokens", "must not exceed the prompt")],
            )
        prompt = await worker.reuse.identify(wanted.task)
        grammar = await worker.grammars.of(wanted.task)
        if wanted.key in self._jobs:
            raise AlreadyExists("this attempt is being prefilled already")
        blocks = self._take_blocks(prompt)
        job = PrefillJob(worker, wanted, blocks, grammar, on_end=self._ended)
        self._jobs[wanted.key] = job
        job.start()
        return job

    async def stop(self, attempt: AttemptId) -> "PrefillJob | None":
        """Stop between chunks. Returns the job, over now, if there was one that still ran."""
        job = self._jobs.get(attempt_key(attempt))
        if job is None or not job.abandon():
            return None
        await job.over()
        return job

    def _take_blocks(self, prompt: Prompt) -> PromptBlocks:
        worker = self._worker
        if worker.draining:
            raise self._full("the worker is draining")
        hashes = worker.reuse.reusable(prompt)
        num_held_tokens = worker.engine.pool.match(hashes) * BLOCK_TOKENS
        if not worker.backlog.has_room(prompt.num_tokens - num_held_tokens):
            raise self._full(f"{worker.backlog.num_tokens} tokens are queued")
        worker.check_fits(prompt.num_tokens)
        if worker.engine.num_swapped:
            raise self._full("sequences are swapped out for want of blocks")
        try:
            return worker.reuse.take(prompt, hashes, num_positions=prompt.num_tokens)
        except PoolExhausted as error:
            raise self._full(str(error)) from error

    def _full(self, why: str) -> PrefillFull:
        self._worker.metrics.refusals.labels("PREFILL_FULL").inc()
        return PrefillFull(why, retry_after_s=self._worker.backlog.retry_after_s())

    def _ended(self, job: "PrefillJob") -> None:
        self._jobs.pop(job.wanted.key, None)


class PrefillJob:
    """One prompt being computed and handed over.

    Its blocks are held until the engine has let go of them and the hand-over has ended.
    """

    def __init__(
        self,
        worker: Worker,
        wanted: PrefillTask,
        blocks: PromptBlocks,
        grammar: "Grammar | None",
        *,
        on_end: "Callable[[PrefillJob], None]",
    ) -> None:
        self.wanted = wanted
        self.handover = Handover(
            block_table=blocks.block_table,
            num_layers=worker.engine.layout.num_layers,
            first_token=wanted.held_tokens,
            num_tokens=blocks.prompt.num_tokens,
            on_close=self._handover_closed,
        )
        self._worker = worker
        self._blocks = blocks
        self._grammar = grammar
        self._on_end = on_end
        self._admitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._running: Running | None = None
        self._output: asyncio.Future[Output] = self._loop.create_future()
        self._task: asyncio.Task[PrefillDone] | None = None
        self._computing = True

    @property
    def num_computed_tokens(self) -> int:
        """Prompt tokens computed so far, reused ones excluded."""
        return self._blocks.num_computed_tokens - self._blocks.num_reused_tokens

    def start(self) -> None:
        """Open the hand-over and begin to compute."""
        self._worker.handovers.offer(self.handover)
        self._worker.backlog.add(self._blocks)
        self._task = asyncio.create_task(self._run(), name=f"prefill {self.wanted.key}")
        self._task.add_done_callback(self._over)

    async def result(self) -> PrefillDone:
        """When all is computed. Raises Cancelled if stopped, Internal if the engine failed."""
        task = await self.over()
        if task.cancelled():
            raise Cancelled("the prefill was stopped")
        return task.result()

    async def over(self) -> asyncio.Task[PrefillDone]:
        """When the engine is done with it, however it ended."""
        assert self._task is not None
        await asyncio.wait([self._task])
        return self._task

    def abandon(self) -> bool:
        """Nobody wants it any more: stop between chunks, free all. Returns whether it still ran."""
        was_computing = self._computing
        self._worker.handovers.close(self.handover, HandoverState.ABORTED)
        return was_computing

    async def _run(self) -> PrefillDone:
        blocks = self._blocks
        self._ready(0, blocks.num_ready_tokens)
        await self._worker.reuse.fetch(blocks)
        self._ready(blocks.num_ready_tokens, blocks.num_cached_tokens)
        seq = self._sequence()
        blocks.submitted(seq)
        self._running = self._worker.thread.submit(seq, self._on_output)
        if self.handover.state.closed:
            self._running.stop("cancelled")
        output = await self._output
        if isinstance(output, FinishedOutput) and output.reason == FinishReason.DEAD_END.value:
            raise dead_end()
        if not isinstance(output, PrefilledOutput):
            raise Cancelled("the prefill was stopped")
        self._worker.reuse.offer(blocks)
        return self._done(output)

    def _on_output(self, output: Output | Internal) -> None:
        if isinstance(output, Internal):
            self._output.set_exception(output)
        else:
            self._output.set_result(output)

    def _sequence(self) -> Sequence:
        task, prompt = self.wanted.task, self._blocks.prompt
        return sequence_of(
            "prefill " + "/".join(map(str, self.wanted.key)),
            task,
            prompt.token_ids,
            max_tokens=1,
            root=prompt.root,
            num_relayed_tokens=task.relayed_tokens,
            grammar=self._grammar,
            block_table=self._blocks.block_table,
            num_cached_tokens=self._blocks.num_cached_tokens,
            prefill_only=True,
            on_layer=self._on_layer,
        )

    @property
    def busy_seconds(self) -> float:
        """Compute that the prompt has used; all of it once the job is over."""
        return 0.0 if self._running is None else self._running.seq.prefill_ns / 1e9

    def _done(self, output: PrefilledOutput) -> PrefillDone:
        elapsed, busy_seconds = time.perf_counter() - self._admitted, self.busy_seconds
        fetching = self._blocks.fetch_seconds
        worker = self._worker
        usage = self._blocks.usage(PREFILL_SITE_PREFILL_WORKER, worker.worker_id)
        worker.count_prefill(usage, busy_seconds + fetching)
        return prefill_done(
            output,
            usage=usage,
            queued_us=microseconds(elapsed - busy_seconds - fetching),
            prefill_us=microseconds(busy_seconds + fetching),
            fetch_us=microseconds(fetching),
            busy_seconds=busy_seconds,
        )

    def _on_layer(self, layer: int, start: int, end: int) -> None:
        """On the engine's thread."""
        self._loop.call_soon_threadsafe(self._layer_ready, layer, start, end)

    def _layer_ready(self, layer: int, start: int, end: int) -> None:
        self.handover.ready(layer, max(start, self._blocks.num_cached_tokens), end)
        if layer == self._worker.engine.layout.num_layers - 1 and self._computing:
            self._worker.reuse.computed(self._blocks, to=end)

    def _ready(self, start: int, end: int) -> None:
        for layer in range(self._worker.engine.layout.num_layers):
            self.handover.ready(layer, start, end)

    def _handover_closed(self, state: HandoverState) -> None:
        self._worker.metrics.handovers.labels(state.value).inc()
        if not self._computing:
            self._blocks.release()
        elif self._running is not None:
            self._running.stop("cancelled")
        elif self._task is not None:
            self._task.cancel()

    def _over(self, task: asyncio.Task[PrefillDone]) -> None:
        """The engine no longer touches the blocks."""
        self._computing = False
        self._worker.backlog.discard(self._blocks, busy_seconds=self.busy_seconds)
        self._on_end(self)
        if task.cancelled() or task.exception() is not None:
            self._worker.metrics.stopped_tokens.inc(self.num_computed_tokens)
            self._worker.handovers.close(self.handover, HandoverState.ABORTED)
        if self.handover.state.closed:
            self._blocks.release()
