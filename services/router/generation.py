"""One admitted request, from its place in the queue to its bill.

It runs in a task that the client's call does not own: a client that vanishes ends the request, and
never its settlement. Every attempt is one round of `_generate`'s loop.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import aclosing

from services.router.admission import Admitted
from services.router.attempt import Attempt
from services.router.config import LimitsConfig
from services.router.dispatch import Dispatcher, Placed, Ticket
from services.router.finish import Completed, Finish, Timing
from services.router.fleet import Worker
from services.router.outbox import Outbox
from services.router.relay import Choice, Relay
from services.router.reports import Report
from services.router.requests import RequestBook
from services.router.settle import Settler
from services.router.tally import ChoiceEnded, Ended, Generated, Prefilled
from services.router.tasks import OwnedTasks
from services.router.worker_task import start_message
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.billing import Usage
from tidemill.errors import (
    DeadlineExceeded,
    Internal,
    Overloaded,
    PrefillFull,
    TidemillError,
    Unavailable,
    WorkerLost,
)

_REFUSED_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_LOST_S = 3.0
_STAFFED_POLL_S = 0.2

logger = logging.getLogger(__name__)


class Generation:
    """Queues, dispatches, relays and settles one request; `outbox` is what its client reads."""

    def __init__(
        self,
        admitted: Admitted,
        *,
        dispatcher: Dispatcher,
        settler: Settler,
        book: RequestBook,
        tasks: OwnedTasks,
        limits: LimitsConfig,
        clock: Callable[[], float],
    ) -> None:
        self.admitted = admitted
        self.outbox = Outbox(
            max_tokens=limits.coalesce_tokens, max_delay_s=limits.coalesce_s, clock=clock
        )
        self._dispatcher = dispatcher
        self._settler = settler
        self._book = book
        self._tasks = tasks
        self._limits = limits
        self._clock = clock
        self._relay = Relay(admitted, self.outbox, max_tokens=limits.coalesce_tokens)
        self._tally = self._relay.tally
        self._ending: Finish | None = None
        self._over = False
        self._attempt: Attempt | None = None
        self._patience: asyncio.Timeout | None = None
        self._finals: list[Attempt] = []
        self._num_attempts = 0
        self._admitted_at = clock()
        self._placed_at = self._first_token_at = self._admitted_at

    def start(self) -> None:
        """Take a place in the queue and run; QueueFull if there is none."""
        loop = asyncio.get_running_loop()
        self._ticket = Ticket(
            key=self.admitted.key,
            tenant_id=self.admitted.tenant.id,
            num_prompt_tokens=len(self.admitted.token_ids),
            max_tokens=self.admitted.sampling.max_tokens,
            block_hashes=self.admitted.block_hashes,
            moved=self.outbox.move,
            placed=loop.create_future(),
        )
        position = self._dispatcher.enqueue(self._ticket)
        self.outbox.accept(position)
        self._timers = [
            loop.call_later(self.admitted.first_token_timeout_s, self._first_token_is_late),
            loop.call_later(self.admitted.total_timeout_s, self.end, Finish.DEADLINE),
        ]
        self._tasks.spawn(self._run(), name=f"generation {self.admitted.key}")

    def end(self, finish: Finish) -> None:
        """Bring the request to its end; only the first reason counts."""
        if self._over or self._ending is not None:
            return
        self._ending = finish
        self._dispatcher.withdraw(self._ticket)
        if self._attempt is not None:
            self._await_final()
            self._tasks.spawn(self._attempt.stop(finish), name="stop")

    def _await_final(self) -> None:
        """From now on the attempt's Final is due."""
        if self._patience is not None:
            loop = asyncio.get_running_loop()
            self._patience.reschedule(loop.time() + self._limits.final_wait_s)

    def _first_token_is_late(self) -> None:
        if self._tally.prefilled is None:
            self.end(Finish.DEADLINE)

    async def _run(self) -> None:
        failure: TidemillError | None = None
        try:
            await self._generate()
            if self._ending is Finish.SERVER_FAULT:
                failure = Unavailable("the router is stopping", reason="ROUTER_STOPPING")
        except asyncio.CancelledError:
            failure = Unavailable("the router is stopping", reason="ROUTER_STOPPING")
            raise
        except TidemillError as error:
            failure = error
        except Exception as error:
            failure = Internal("internal error", error_id=uuid.uuid4().hex)
            logger.error("generation failed", exc_info=error, extra=failure.metadata)
        finally:
            self._over = True
            for timer in self._timers:
                timer.cancel()
            self._settle(failure)

    async def _generate(self) -> None:
        """Attempt until one succeeds; a lost worker is replaced only before the first token."""
        num_lost = num_refused = 0
        lost: WorkerLost | None = None
        while (placed := await self._place(lost)) is not None:
            self._placed_at = self._clock()
            try:
                await self._serve(placed)
                self._note_filled(placed.decode)
                return
            except Overloaded as refusal:
                target = placed.prefill or placed.decode
                full = target if isinstance(refusal, PrefillFull) else placed.decode
                wait_s = max(refusal.retry_after_s or 0, _REFUSED_S[min(num_refused, 5)])
                num_refused += 1
            except TidemillError as loss:
                if self._ending is not None:
                    return
                too_late = self._tally.prefilled is not None
                too_often = num_lost >= self._limits.max_lost_attempts
                if not isinstance(loss, WorkerLost) or too_late or too_often:
                    raise
                self._tally.write_off()
                full = _blamed(loss, placed)
                wait_s = _LOST_S
                num_lost += 1
                lost = loss
            finally:
                self._dispatcher.release(self.admitted.key)
            if self._ending is not None:
                return
            self._dispatcher.put_back(self._ticket, refused_by=full.id, for_s=min(wait_s, _LOST_S))

    async def _place(self, lost: WorkerLost | None) -> Placed | None:
        """Where to attempt next, None if the place was given up.

        Once a worker was lost there must be others, or it is raised again; that all are busy is
        no reason to give up.
        """
        placed = self._ticket.placed
        patience_s = None if lost is None else self._limits.lost_patience_s
        while not (await asyncio.wait([placed], timeout=patience_s))[0]:
            if lost is not None and not self._dispatcher.staffed:
                self._dispatcher.withdraw(self._ticket)
                raise lost
            patience_s = _STAFFED_POLL_S
        return placed.result()

    async def _serve(self, placed: Placed) -> None:
        """One attempt, to its Final."""
        if self._ending is not None:
            return
        self._num_attempts += 1
        start = start_message(self.admitted, placed, attempt=self._num_attempts)
        attempt = Attempt(placed.decode, start, final_wait_s=self._limits.final_wait_s)
        try:
            async with asyncio.timeout(None) as self._patience:
                self._attempt = attempt
                async with aclosing(attempt.reports()) as reports:
                    async for report in reports:
                        self._take(attempt, report)
        except TimeoutError:
            raise WorkerLost(f"decode worker {placed.decode.id} sent no Final") from None
        finally:
            self._attempt = self._patience = None
            await attempt.close()

    def _note_filled(self, decode: Worker) -> None:
        """Let the next turn look for the answer there, where all but its last token lies."""
        for choice in self._relay.choices:
            self._dispatcher.filled(decode.id, self.admitted.chain(choice.token_ids[:-1]))

    def _take(self, attempt: Attempt, report: Report) -> None:
        choices = self._relay.choices
        match report:
            case Prefilled():
                self._first_token_at = self._clock()
                self._tally.prefilled = report
                self._dispatcher.prefilled(self.admitted.key)
                self._relay.score_prompt(report.prompt_logprobs)
                for choice, token_id in zip(choices, report.token_ids, strict=True):
                    logprobs = report.logprobs[choice.index : choice.index + 1]
                    self._pass_on(attempt, choice, (token_id,), logprobs)
            case Generated():
                self._pass_on(attempt, choices[report.choice], report.token_ids, report.logprobs)
            case ChoiceEnded():
                choice = choices[report.choice]
                choice.counts.reported = report.generated_tokens
                self._relay.end(choice, report.finish)
            case Ended():
                self._tally.end(report)
                self._finals.append(attempt)

    def _pass_on(
        self,
        attempt: Attempt,
        choice: Choice,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> None:
        """Relay tokens; have the worker end a choice that they bring to a stop string."""
        going_on = choice.finish is None
        self._relay.push(choice, token_ids, logprobs)
        if not going_on or choice.finish is None or self._ending is not None:
            return
        index = choice.index if len(self._relay.choices) > 1 else None
        stop = attempt.stop(choice.finish, choice.counts.kept, choice=index)
        self._tasks.spawn(stop, name="stop")
        if self._relay.all_ended:
            self._ending = choice.finish
            self._await_final()

    def _settle(self, failure: TidemillError | None) -> None:
        """Once, whatever happened: write off or bill, remember, tell the client, acknowledge."""
        if failure is not None:
            self._tally.write_off()
        finish = self._finish() if failure is None else Finish.SERVER_FAULT
        usage = self._tally.usage()
        completed: Completed | None = None
        try:
            if failure is None:
                completed = self._bill(usage, finish)
            else:
                self._settler.write_off(self.admitted, usage, failure)
            if completed and completed.finish is Finish.DEADLINE and not usage.prompt_tokens:
                failure = DeadlineExceeded("no token was generated before the deadline")
        except Exception as error:
            failure = Internal("internal error", error_id=uuid.uuid4().hex)
            logger.error("settlement failed", exc_info=error, extra=failure.metadata)
        keep = completed if failure is None and usage.prompt_tokens else None
        self._book.end(self.admitted.key, keep)
        if failure is not None:
            failure.request_id = self.admitted.ask.request_id
        self.outbox.close(failure or completed or Internal("nothing was settled"))
        for attempt in self._finals:
            self._tasks.spawn(attempt.acknowledge(), name="acknowledge")

    def _bill(self, usage: Usage, finish: Finish) -> Completed:
        now = self._clock()
        first_token_s = self._first_token_at - self._admitted_at if usage.prompt_tokens else 0.0
        timing = Timing(
            queued_us=round((self._placed_at - self._admitted_at) * 1e6),
            first_token_us=round(first_token_s * 1e6),
            total_us=round((now - self._admitted_at) * 1e6),
            prefill_us=self._tally.prefilled.prefill_us if self._tally.prefilled else 0,
            decode_busy_seconds=self._tally.busy_seconds,
        )
        return self._settler.settle(
            self.admitted,
            usage,
            finish=finish,
            site=self._tally.site,
            timing=timing,
            attempts=max(self._num_attempts, 1),
        )

    def _finish(self) -> Finish:
        """End the choices that still go on; why the last one ended.

        A stop string wins, then what the worker said, then why it was to end.
        """
        ended, finish = self._tally.ended, self._ending or Finish.SERVER_FAULT
        if ended is not None and ended.finish is not Finish.SERVER_FAULT:
            finish = ended.finish
        for choice in self._relay.choices:
            self._relay.end(choice, finish)
        return self._relay.last_finish or finish


def _blamed(loss: WorkerLost, placed: Placed) -> Worker:
    """The worker that was lost: the prefill worker where the decode worker says so."""
    named = loss.metadata.get("worker_id")
    if placed.prefill is not None and named == placed.prefill.id:
        return placed.prefill
    return placed.decode
