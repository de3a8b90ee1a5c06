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
from services.router.attempt import Attempt, Report
from services.router.config import LimitsConfig
from services.router.dispatch import Dispatcher, Placed, Ticket
from services.router.finish import Completed, Finish, Timing
from services.router.fleet import Worker
from services.router.outbox import Outbox, Piece
from services.router.requests import RequestBook
from services.router.settle import Settler
from services.router.tally import Ended, Generated, Prefilled, Tally
from services.router.tasks import OwnedTasks
from services.router.worker_task import start_message
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
from tidemill.text import TextStream

_REFUSED_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_LOST_S = 3.0

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
        model = admitted.model
        self._text = TextStream(
            model.tokenizer,
            admitted.ask.stop,
            reasoning=model.config.reasoning,
            inside=model.tokenizer.opens_reasoning(admitted.token_ids),
        )
        self._tally = Tally()
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
        if self._attempt is not None and self._patience is not None:
            loop = asyncio.get_running_loop()
            self._patience.reschedule(loop.time() + self._limits.final_wait_s)
            keep = self._text.num_tokens if self._text.stopped else None
            self._tasks.spawn(self._attempt.stop(finish, keep), name="stop")

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
        lost = refused = 0
        while (placed := await self._ticket.placed) is not None:
            self._placed_at = self._clock()
            try:
                await self._serve(placed)
                return
            except Overloaded as refusal:
                target = placed.prefill or placed.decode
                full = target if isinstance(refusal, PrefillFull) else placed.decode
                wait_s = max(refusal.retry_after_s or 0, _REFUSED_S[min(refused, 5)])
                refused += 1
            except TidemillError as loss:
                if self._ending is not None:
                    return
                too_late = self._tally.prefilled is not None
                too_often = lost >= self._limits.max_lost_attempts
                if not isinstance(loss, WorkerLost) or too_late or too_often:
                    raise
                self._tally.write_off()
                full = _blamed(loss, placed)
                wait_s = _LOST_S
                lost += 1
            finally:
                self._dispatcher.release(self.admitted.key)
            if self._ending is not None:
                return
            self._dispatcher.put_back(self._ticket, refused_by=full.id, for_s=min(wait_s, _LOST_S))

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

    def _take(self, attempt: Attempt, report: Report) -> None:
        match report:
            case Prefilled():
                self._first_token_at = self._clock()
                self._tally.prefilled = report
                self._dispatcher.prefilled(self.admitted.key)
                self._relay((report.token_id,))
            case Generated():
                self._relay(report.token_ids)
            case Ended():
                self._tally.end(report)
                self._finals.append(attempt)

    def _relay(self, token_ids: Sequence[int]) -> None:
        """Pass tokens on as text, in messages of bounded size."""
        size = self._limits.coalesce_tokens
        for start in range(0, len(token_ids), size):
            some = token_ids[start : start + size]
            first_index = self._text.num_tokens
            self._tally.received_tokens += len(some)
            delta = self._text.push(some)
            if delta.token_ids or delta.content or delta.reasoning:
                self._put(first_index, delta.token_ids, delta.content, delta.reasoning)
        if self._text.stopped:
            self.end(Finish.STOP)

    def _put(self, index: int, token_ids: tuple[int, ...], text: str, reasoning: str) -> None:
        usage = self._tally.usage(
            kept_tokens=self._text.num_tokens,
            reasoning_tokens=self._text.num_reasoning_tokens,
            max_tokens=self.admitted.sampling.max_tokens,
        )
        self.outbox.put(
            Piece(
                first_index=index,
                token_ids=token_ids,
                text=text,
                reasoning=reasoning,
                usage=usage,
                site=self._tally.site,
            )
        )

    def _settle(self, failure: TidemillError | None) -> None:
        """Once, whatever happened: write off or bill, remember, tell the client, acknowledge."""
        tail = self._text.finish()
        if tail.content or tail.reasoning:
            self._put(self._text.num_tokens, (), tail.content, tail.reasoning)
        if failure is not None:
            self._tally.write_off()
        usage = self._tally.usage(
            kept_tokens=self._text.num_tokens if self._text.stopped else None,
            reasoning_tokens=self._text.num_reasoning_tokens,
            max_tokens=self.admitted.sampling.max_tokens,
        )
        completed: Completed | None = None
        try:
            if failure is None:
                completed = self._bill(usage)
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

    def _bill(self, usage: Usage) -> Completed:
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
            finish=self._finish(),
            site=self._tally.site,
            timing=timing,
            attempts=max(self._num_attempts, 1),
        )

    def _finish(self) -> Finish:
        """A stop string wins, then what the worker said, then why it was to end."""
        if self._text.stopped:
            return Finish.STOP
        ended = self._tally.ended
        if ended is not None and ended.finish is not Finish.SERVER_FAULT:
            return ended.finish
        return self._ending or Finish.SERVER_FAULT


def _blamed(loss: WorkerLost, placed: Placed) -> Worker:
    """The worker that was lost: the prefill worker where the decode worker says so."""
    named = loss.metadata.get("worker_id")
    if placed.prefill is not None and named == placed.prefill.id:
        return placed.prefill
    return placed.decode
