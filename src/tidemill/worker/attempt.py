"""One attempt of one request on a decode worker, from Start to Final."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, FinishReason, PrefillDone
from tidemill.api.common.v1.usage_pb2 import PREFILL_SITE_DECODE_WORKER, PromptUsage
from tidemill.api.decode.v1.decode_service_pb2 import Final, Start
from tidemill.api.prefill.v1.prefill_service_pb2 import PrefillRequest
from tidemill.engine import (
    FinishedOutput,
    Output,
    PausedOutput,
    PrefilledOutput,
    Sequence,
    TokensOutput,
)
from tidemill.engine.sequence import OnLayer
from tidemill.errors import DeadlineExceeded, Internal, TidemillError
from tidemill.kv.segments import Landing
from tidemill.worker.engine_thread import Running
from tidemill.worker.outbox import Outbox
from tidemill.worker.prompt import PromptBlocks
from tidemill.worker.remote_prefill import PrefillPeer
from tidemill.worker.task import attempt_key, microseconds, sampling_params
from tidemill.worker.worker import Worker

logger = logging.getLogger(__name__)

Reason: TypeAlias = FinishReason.ValueType
_PREFIX = "FINISH_REASON_"


@dataclass(frozen=True)
class _Ending:
    """How an attempt ends: why, and what the engine reported."""

    reason: Reason
    busy_seconds: float = 0.0
    error: TidemillError | None = None


def sequence_id(attempt: AttemptId) -> str:
    """The engine's name for an attempt's sequence."""
    return "decode " + "/".join(map(str, attempt_key(attempt)))


class Attempt:
    """Prefills elsewhere or in place, then decodes; speaks through its outbox.

    Runs in its own task, so that it outlives a router's stream just long enough to stop, to free
    its blocks and to leave a Final. `on_end` gets that Final; None means that it was refused
    before anything began.
    """

    def __init__(
        self,
        worker: Worker,
        start: Start,
        blocks: PromptBlocks,
        peer: PrefillPeer | None,
        *,
        timeout_s: float,
        on_end: "Callable[[Attempt, Final | None], None]",
    ) -> None:
        self.start = start
        self.outbox = Outbox(start.task.id.attempt, pace_s=worker.chunk_pace_s)
        self._worker = worker
        self._blocks = blocks
        self._peer = peer
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._admitted = time.perf_counter()
        self._running: Running | None = None
        self._ending: asyncio.Future[_Ending] = self._loop.create_future()
        self._transfer: asyncio.Task[Sequence] | None = None
        self._budget_timer: asyncio.TimerHandle | None = None
        self._stop: tuple[Reason, int | None] | None = None
        self._failure: TidemillError | None = None
        self._began = peer is None
        self._prompt_usage: PromptUsage | None = None
        self._funded: int | None = None
        if start.HasField("funded_tokens"):
            self._funded = start.funded_tokens - start.relayed_tokens
        if peer is None:
            worker.backlog.add(blocks)

    def fund(self, total_tokens: int) -> None:
        """More of the request's completion tokens are paid for."""
        if self._funded is None:
            return
        self._funded = max(self._funded, total_tokens - self.start.relayed_tokens)
        if self._running is not None:
            self._running.fund(self._funded)
            if self._running.seq.num_generated < self._funded:
                self._cancel_budget_timer()

    def stop(self, reason: Reason, keep_tokens: int | None = None) -> None:
        """End; the first reason given stands. Final follows."""
        if self._stop is not None:
            return
        self._stop = (reason, keep_tokens)
        if self._running is not None:
            self._running.stop(_name(reason), keep_tokens)
        elif self._transfer is not None:
            self._transfer.cancel()

    def fail(self, error: TidemillError) -> None:
        """End because of what the router said; `error` follows Final."""
        self._failure = error
        self.stop(FinishReason.FINISH_REASON_SERVER_FAULT)

    def supersede(self) -> None:
        """Another router has taken the request over."""
        self.stop(FinishReason.FINISH_REASON_SERVER_FAULT)

    async def run(self) -> None:
        """From admission to Final; what went wrong is in the outbox."""
        try:
            ending = await self._run()
        except TidemillError as error:
            ending = self._failed(error)
        except Exception as error:  # a true surprise still owes the router its Final
            logger.exception("attempt failed", extra=self._log_extra())
            ending = self._failed(Internal(f"the attempt failed: {type(error).__name__}"))
        finally:
            self._cancel_budget_timer()
            self._worker.backlog.discard(self._blocks, busy_seconds=0.0)
            self._worker.engine.dismiss(sequence_id(self.start.task.id))
            self._blocks.release()
        self._close(ending)

    async def _run(self) -> _Ending:
        if (stopped := self._stopped()) is not None:
            return stopped
        prefill = self._fetch() if self._peer is None else self._prefill_on(self._peer)
        self._transfer = asyncio.create_task(prefill)
        try:
            seq = await self._transfer
        except asyncio.CancelledError:
            if (stopped := self._stopped()) is not None:
                return stopped
            raise
        if (stopped := self._stopped()) is not None:
            return stopped
        self._blocks.submitted(seq)
        self._running = self._worker.thread.submit(seq, self._on_output)
        if self._funded is not None:  # what came while the prompt was prefilled
            self._running.fund(self._funded)
        return await self._ending

    def _stopped(self) -> _Ending | None:
        return None if self._stop is None else _Ending(self._stop[0])

    async def _fetch(self) -> Sequence:
        """Prefill in place: what the cache has now, the rest by the engine."""
        await self._worker.reuse.fetch(self._blocks)
        return self._sequence(
            num_cached_tokens=self._blocks.num_cached_tokens, on_layer=self._on_layer
        )

    async def _prefill_on(self, peer: PrefillPeer) -> Sequence:
        """Prefill on another worker; returns once all latents have landed."""
        await self._worker.reuse.settle(self._blocks)
        request = PrefillRequest(
            task=self.start.task,
            layout_fingerprint=self._worker.engine.layout.fingerprint(),
            held_tokens=self._blocks.num_held_tokens,
        )
        self._worker.num_waiting += 1
        try:
            done = await peer.prefill(
                request,
                self._landing,
                timeout_s=self._timeout_s,
                on_offer=self._offered,
                on_done=self._prefilled,
            )
        finally:
            self._worker.num_waiting -= 1
        self._blocks.commit(to=self._blocks.prompt.num_tokens)
        return self._sequence(first_token_id=done.first_token_id)

    def _sequence(
        self,
        *,
        num_cached_tokens: int = 0,
        first_token_id: int | None = None,
        on_layer: OnLayer | None = None,
    ) -> Sequence:
        task = self.start.task
        max_tokens = task.sampling.max_tokens - self.start.relayed_tokens
        return Sequence(
            sequence_id(task.id),
            self._blocks.prompt.token_ids,
            block_table=self._blocks.block_table,
            sampling=sampling_params(task, max_tokens=max_tokens),
            num_cached_tokens=num_cached_tokens,
            first_token_id=first_token_id,
            num_relayed_tokens=self.start.relayed_tokens,
            num_funded_tokens=self._funded,
            on_layer=on_layer,
            root=self._blocks.prompt.root,
        )

    def _landing(self) -> Landing:
        return Landing(
            self._worker.engine.pool,
            self._worker.engine.layout,
            self._blocks.block_table,
            first_token=self._blocks.num_held_tokens,
            num_tokens=self._blocks.prompt.num_tokens,
        )

    def _offered(self) -> None:
        self._began = True

    def _prefilled(self, done: PrefillDone) -> None:
        self._prompt_usage = done.usage
        self.outbox.prefill_done(done)

    def _on_layer(self, layer: int, _start: int, end: int) -> None:
        """On the engine's thread."""
        if layer == self._worker.engine.layout.num_layers - 1:
            self._loop.call_soon_threadsafe(self._computed, end)

    def _computed(self, end: int) -> None:
        self._worker.reuse.computed(self._blocks, to=end)

    def _on_output(self, output: Output | Internal) -> None:
        """What the engine computed; a surprise here ends the attempt, not the other sequences."""
        try:
            self._relay(output)
        except Exception as error:
            logger.exception("attempt failed", extra=self._log_extra())
            if isinstance(output, FinishedOutput):
                self._ending.set_exception(error)
            else:
                self.fail(Internal(f"the attempt failed: {type(error).__name__}"))

    def _relay(self, output: Output | Internal) -> None:
        if isinstance(output, TokensOutput):
            self.outbox.tokens(output.first_index, output.token_ids)
        elif isinstance(output, PrefilledOutput):
            self._prefilled_in_place(output.first_token_id)
        elif isinstance(output, PausedOutput):
            self._paused()
        elif isinstance(output, FinishedOutput):
            self._worker.reuse.offer(self._blocks)
            self._ending.set_result(_Ending(_reason(output.reason), output.busy_seconds))
        else:
            self._ending.set_exception(output)

    def _prefilled_in_place(self, first_token_id: int) -> None:
        assert self._running is not None
        worker, busy_seconds = self._worker, self._running.seq.busy_seconds
        worker.backlog.discard(self._blocks, busy_seconds=busy_seconds)
        usage = self._blocks.usage(PREFILL_SITE_DECODE_WORKER, worker.worker_id)
        seconds = busy_seconds + self._blocks.fetch_seconds
        worker.count_prefill(usage, seconds)
        self._prefilled(
            PrefillDone(
                first_token_id=first_token_id,
                usage=usage,
                queued_us=microseconds(time.perf_counter() - self._admitted - seconds),
                prefill_us=microseconds(seconds),
                fetch_us=microseconds(self._blocks.fetch_seconds),
            )
        )

    def _paused(self) -> None:
        """Out of funds: more within fund_wait_s, or the end."""
        assert self._running is not None
        self._cancel_budget_timer()
        if self._funded is not None and self._running.seq.num_generated >= self._funded:
            self._budget_timer = self._loop.call_later(
                self._worker.config.fund_wait_s, self.stop, FinishReason.FINISH_REASON_BUDGET
            )

    def _cancel_budget_timer(self) -> None:
        if self._budget_timer is not None:
            self._budget_timer.cancel()
            self._budget_timer = None

    def _failed(self, error: TidemillError) -> _Ending:
        if (stopped := self._stopped()) is not None:
            return stopped
        if isinstance(error, DeadlineExceeded):
            return _Ending(FinishReason.FINISH_REASON_DEADLINE, error=error)
        return _Ending(FinishReason.FINISH_REASON_SERVER_FAULT, error=error)

    def _close(self, ending: _Ending) -> None:
        final = None
        if self._began or ending.error is None:
            final = Final(
                id=self.start.task.id,
                reason=ending.reason,
                generated_tokens=self.outbox.num_generated,
                busy_seconds=ending.busy_seconds,
                prompt=self._prompt_usage,
            )
            self._worker.metrics.finals.labels(_name(ending.reason)).inc()
            self._worker.metrics.generated_tokens.inc(self.outbox.num_generated)
        self._on_end(self, final)
        self.outbox.close(final, ending.error or self._failure)

    def _log_extra(self) -> dict[str, object]:
        task_id = self.start.task.id
        return {"request_id": task_id.request_id, "attempt": task_id.attempt}


def _name(reason: Reason) -> str:
    return FinishReason.Name(reason).removeprefix(_PREFIX).lower()


def _reason(name: str) -> Reason:
    return FinishReason.Value(_PREFIX + name.upper())
