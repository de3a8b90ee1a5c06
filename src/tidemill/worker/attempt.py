"""One attempt of one request on a decode worker, from Start to Final."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, FinishReason, PrefillDone
from tidemill.api.common.v1.usage_pb2 import PREFILL_SITE_DECODE_WORKER, PromptUsage
from tidemill.api.decode.v1.decode_service_pb2 import Final, Start
from tidemill.api.prefill.v1.prefill_service_pb2 import PrefillRequest
from tidemill.engine import PrefilledOutput, Sequence
from tidemill.errors import DeadlineExceeded, Internal, InvalidRequest, TidemillError
from tidemill.kv.segments import Landing
from tidemill.worker.choices import Choices, Ending, Reason, name_of
from tidemill.worker.chunk_channel import ChunkChannel
from tidemill.worker.outbox import Outbox
from tidemill.worker.prompt import PromptBlocks
from tidemill.worker.remote_prefill import PrefillPeer
from tidemill.worker.task import (
    attempt_key,
    microseconds,
    num_choices,
    prefill_done,
    sequence_of,
)
from tidemill.worker.worker import Worker

if TYPE_CHECKING:  # it imports xgrammar, which only workers that follow grammars pay for
    from tidemill.engine.grammar import Grammar

logger = logging.getLogger(__name__)


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
        grammar: "Grammar | None",
        peer: PrefillPeer | None,
        *,
        channel: ChunkChannel | None = None,
        timeout_s: float,
        on_end: "Callable[[Attempt, Final | None], None]",
    ) -> None:
        self.start = start
        number = start.route.number
        self.outbox = Outbox(
            start.task.id.attempt, pace_s=worker.chunk_pace_s, channel=channel, number=number
        )
        self._worker = worker
        self._blocks = blocks
        self._grammar = grammar
        self._peer = peer
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._admitted = time.perf_counter()
        self._transfer: asyncio.Task[Sequence] | None = None
        self._stop: Reason | None = None
        self._failure: TidemillError | None = None
        self._began = peer is None
        self._prompt_usage: PromptUsage | None = None
        self._far_prefill_seconds = 0.0
        funded = start.funded_tokens - start.relayed_tokens
        self._choices = Choices(
            num_choices(start.task),
            self.outbox,
            worker.thread,
            funded_tokens=funded if start.HasField("funded_tokens") else None,
            fund_wait_s=worker.config.fund_wait_s,
            on_prefilled=self._prefilled_in_place,
            on_ended=blocks.ended,
        )
        if channel is not None:
            channel.attach(number, self._unheard)
        if peer is None:
            worker.backlog.add(blocks)

    def fund(self, total_tokens: int) -> None:
        """More of the request's completion tokens, of all choices together, are paid for."""
        self._choices.fund(total_tokens - self.start.relayed_tokens)

    def stop(
        self, reason: Reason, keep_tokens: int | None = None, *, choice: int | None = None
    ) -> None:
        """End all, or one choice; the first reason given stands. Final follows once all ended.

        Raises InvalidRequest for a choice that there is not.
        """
        if self._stop is not None:
            return
        if choice is not None:
            self._stop_choice(choice, reason, keep_tokens)
            return
        self._stop = reason
        self._choices.stop_all(reason, keep_tokens)
        if not self._choices.submitted and self._transfer is not None:
            self._transfer.cancel()

    def _stop_choice(self, choice: int, reason: Reason, keep_tokens: int | None) -> None:
        if choice >= self._choices.num_choices:
            problem = f"must be below {self._choices.num_choices}"
            raise InvalidRequest(f"choice {problem}", violations=[("stop.choice", problem)])
        self._choices.stop(choice, reason, keep_tokens)
        if self._choices.all_stopped and not self._choices.submitted:
            self.stop(reason)

    def fail(self, error: TidemillError) -> None:
        """End because of what the router said; `error` follows Final."""
        self._failure = error
        self.stop(FinishReason.FINISH_REASON_SERVER_FAULT)

    def supersede(self) -> None:
        """Another router has taken the request over."""
        self.stop(FinishReason.FINISH_REASON_SERVER_FAULT)

    def _unheard(self) -> None:
        """The channel broke: nobody gets the tokens."""
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
            self._worker.backlog.discard(self._blocks, busy_seconds=0.0)
            self._worker.engine.dismiss(sequence_id(self.start.task.id))
            self._blocks.release()
        self._close(ending)

    async def _run(self) -> Ending:
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
        self._choices.submit(seq)
        ending = await self._choices.ending
        self._worker.reuse.offer(self._blocks)
        return ending

    def _stopped(self) -> Ending | None:
        return None if self._stop is None else Ending(self._stop)

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
                on_done=self._prefilled_elsewhere,
                on_stopped=self._stopped_elsewhere,
            )
        finally:
            self._worker.num_waiting -= 1
        self._blocks.commit(to=self._blocks.prompt.num_tokens)
        return self._sequence(first_token_ids=done.first_token_ids or [done.first_token_id])

    def _sequence(self, **fields: Any) -> Sequence:
        task, prompt = self.start.task, self._blocks.prompt
        return sequence_of(
            sequence_id(task.id),
            task,
            prompt.token_ids,
            max_tokens=task.sampling.max_tokens - self.start.relayed_tokens,
            root=prompt.root,
            num_relayed_tokens=self.start.relayed_tokens,
            grammar=self._grammar,
            block_table=self._blocks.block_table,
            **fields,
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

    def _stopped_elsewhere(self, busy_seconds: float) -> None:
        self._far_prefill_seconds = busy_seconds or self._far_prefill_seconds

    def _prefilled_elsewhere(self, done: PrefillDone) -> None:
        self._far_prefill_seconds = done.busy_seconds
        self._prefilled(done)

    def _prefilled(self, done: PrefillDone) -> None:
        self._prompt_usage = done.usage
        self.outbox.prefill_done(done)

    def _on_layer(self, layer: int, _start: int, end: int) -> None:
        """On the engine's thread."""
        if layer == self._worker.engine.layout.num_layers - 1:
            self._loop.call_soon_threadsafe(self._computed, end)

    def _computed(self, end: int) -> None:
        self._worker.reuse.computed(self._blocks, to=end)

    def _prefilled_in_place(self, output: PrefilledOutput) -> None:
        worker, busy_seconds = self._worker, self._choices.prefill_ns / 1e9
        worker.backlog.discard(self._blocks, busy_seconds=busy_seconds)
        usage = self._blocks.usage(PREFILL_SITE_DECODE_WORKER, worker.worker_id)
        seconds = busy_seconds + self._blocks.fetch_seconds
        worker.count_prefill(usage, seconds)
        self._prefilled(
            prefill_done(
                output,
                usage=usage,
                queued_us=microseconds(time.perf_counter() - self._admitted - seconds),
                prefill_us=microseconds(seconds),
                fetch_us=microseconds(self._blocks.fetch_seconds),
                busy_seconds=busy_seconds,
            )
        )

    def _failed(self, error: TidemillError) -> Ending:
        if (stopped := self._stopped()) is not None:
            return stopped
        if isinstance(error, DeadlineExceeded):
            return Ending(FinishReason.FINISH_REASON_DEADLINE, error=error)
        return Ending(FinishReason.FINISH_REASON_SERVER_FAULT, error=error)

    def _close(self, ending: Ending) -> None:
        self._choices.close(ending.reason)
        final = None
        if self._began or ending.error is None:
            final = Final(
                id=self.start.task.id,
                reason=ending.reason,
                generated_tokens=self.outbox.num_generated,
                busy_seconds=self._choices.decode_ns / 1e9,
                prompt=self._prompt_usage,
                prefill_busy_seconds=self._far_prefill_seconds + self._choices.prefill_ns / 1e9,
                prefill_worker_id=self._prefill_worker_id,
                relayed_tokens=self.start.relayed_tokens,
            )
            self._worker.metrics.finals.labels(name_of(ending.reason)).inc()
            self._worker.metrics.generated_tokens.inc(self.outbox.num_generated)
        self._on_end(self, final)
        self.outbox.close(final, ending.error or self._failure)

    @property
    def _prefill_worker_id(self) -> str:
        in_place = self._peer is None
        return self._worker.worker_id if in_place else self.start.prefill.worker_id

    def _log_extra(self) -> dict[str, object]:
        task_id = self.start.task.id
        return {"request_id": task_id.request_id, "attempt": task_id.attempt}
