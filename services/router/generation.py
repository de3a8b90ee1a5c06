"""One request, from its place in the queue to its bill.

It runs in a task that the client's call does not own: a client that vanishes ends the request, and
never its settlement.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from services.router.admission import Admitted
from services.router.attempt import OpenCall
from services.router.config import LimitsConfig
from services.router.crash_points import crash_point
from services.router.dispatch import Dispatcher
from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.money.hold import Hold
from services.router.money.terms import Progress
from services.router.money.treasury import Treasury
from services.router.outbox import Outbox
from services.router.relay import Relay
from services.router.requests import RequestBook
from services.router.serving import Serving
from services.router.tally import Prefilled
from services.router.tasks import OwnedTasks
from services.router.ticket import Placed, Ticket
from services.router.worker_task import wire_id
from tidemill.billing import Usage
from tidemill.errors import Aborted, DeadlineExceeded, Internal, TidemillError, Unavailable

logger = logging.getLogger(__name__)


class Generation:
    """Queues, pays for, serves and settles one request; `outbox` is what its client reads.

    `admitted` is the request as the ledger has it, once it has started.
    """

    def __init__(
        self,
        admitted: Admitted,
        *,
        dispatcher: Dispatcher,
        treasury: Treasury,
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
        self._treasury = treasury
        self._book = book
        self._tasks = tasks
        self._limits = limits
        self._clock = clock
        self._admitted_at = clock()
        self._started = self._over = False
        self._ending: Finish | None = None
        self._why: TidemillError | None = None
        self._ahead: OpenCall | None = None

    async def start(self) -> Completed | None:
        """Take a place in the queue, have the money held and run.

        Returns how the request was settled before, if it was. Raises QueueFull,
        DeadlineUnreachable, and what `Treasury.open` raises. But for a request that runs, nothing
        is left here, nor in the ledger if the caller is cancelled meanwhile.
        """
        loop = asyncio.get_running_loop()
        ticket = Ticket(
            key=self.admitted.key,
            tenant_id=self.admitted.tenant.id,
            num_prompt_tokens=len(self.admitted.token_ids),
            max_tokens=self.admitted.sampling.max_tokens,
            block_hashes=self.admitted.block_hashes,
            priority=self.admitted.ask.priority,
            deadline=self._admitted_at + self.admitted.first_token_timeout_s,
            moved=self.outbox.move,
            placed=loop.create_future(),
        )
        self._place = self._dispatcher.enqueue(ticket)
        let_in = loop.create_future()
        try:
            opening = self._treasury.open(self.admitted)
            if self._treasury.pays(ticket.tenant_id):
                ticket.placed.add_done_callback(partial(self._call_ahead, let_in))
            self._tasks.spawn(self._run(opening, ticket, let_in), name=f"generation {ticket.key}")
            settled: Completed | None = await let_in
        except BaseException:
            self._leave(ticket)
            raise
        if settled is not None:
            self._leave(ticket)
        return settled

    @property
    def usage_so_far(self) -> Usage:
        """What a client that is told of tokens would have used, if they were the last."""
        return self._tally.usage()

    @property
    def prefill_site(self) -> PrefillSite:
        """Who prefilled, as far as is known."""
        return self._tally.site

    def end(self, finish: Finish) -> None:
        """Bring the request to its end; only the first reason counts."""
        if self._started and not self._over:
            self._serving.end(finish)
        self._ending = self._ending or finish

    def _leave(self, ticket: Ticket) -> None:
        """Give up a place in the queue, or at workers, before anything began there."""
        self._dispatcher.withdraw(ticket)
        self._dispatcher.release(ticket.key)
        if self._ahead is not None:
            self._tasks.spawn(self._ahead.drop(), name="drop call")

    def _call_ahead(
        self, let_in: "asyncio.Future[Any]", placing: "asyncio.Future[Placed | None]"
    ) -> None:
        """Open the call to the worker while the ledger still writes the hold; nothing begins."""
        placed = None if let_in.done() or placing.cancelled() else placing.result()
        if placed is not None:
            admitted = self.admitted
            name = wire_id(admitted.tenant.id, admitted.ask.request_id)
            self._ahead = OpenCall(placed.decode, name)

    def _begin(self, hold: Hold, ticket: Ticket) -> None:
        """Now that the money is there."""
        loop = asyncio.get_running_loop()
        self.admitted = hold.admitted
        self._hold = hold
        self._relay = Relay(hold.admitted, self.outbox, max_tokens=self._limits.coalesce_tokens)
        self._tally = self._relay.tally
        if hold.before is not None and hold.before.usage.prompt_tokens:
            self._tally.prefilled = _split_of(hold.before)
        self._serving = Serving(
            hold,
            ticket,
            self._relay,
            ahead=self._ahead,
            dispatcher=self._dispatcher,
            tasks=self._tasks,
            limits=self._limits,
            clock=self._clock,
        )
        self._started = True
        if self._ending is not None:
            self._serving.end(self._ending)
        hold.on_lost = self._lose
        self._timers = [
            loop.call_later(self.admitted.first_token_timeout_s, self._first_token_is_late),
            loop.call_later(self.admitted.total_timeout_s, self.end, Finish.DEADLINE),
        ]
        self.outbox.accept(self._place.position, self._place.wait_s)

    def _first_token_is_late(self) -> None:
        if not self._tally.received:
            self.end(Finish.DEADLINE)

    def _lose(self) -> None:
        """Another router has the request."""
        self._why = Aborted("another router has taken this request over", reason="STALE_FENCE")
        self.end(Finish.SERVER_FAULT)

    async def _run(
        self,
        opening: Coroutine[Any, Any, Hold | Completed],
        ticket: Ticket,
        let_in: "asyncio.Future[Completed | None]",
    ) -> None:
        """From the hold on, in a task of its own; `let_in` is what the client's call waits for."""
        try:
            hold = await opening
        except asyncio.CancelledError:
            let_in.cancel()
            raise
        except Exception as error:
            if not let_in.done():
                let_in.set_exception(error)
            return
        if let_in.done():  # its client has gone away
            if isinstance(hold, Hold):
                await hold.abandon()
        elif isinstance(hold, Completed):
            let_in.set_result(hold)
        else:
            self._begin(hold, ticket)
            let_in.set_result(None)
            await self._serve()

    async def _serve(self) -> None:
        failure: TidemillError | None = None
        try:
            await self._serving.run()
            if self._serving.ending is Finish.SERVER_FAULT:
                failure = self._why or _stopping()
        except asyncio.CancelledError:
            failure = _stopping()
            raise
        except TidemillError as error:
            failure = error
        except Exception as error:
            failure = _surprise("generation failed", error)
        finally:
            self._over = True
            for timer in self._timers:
                timer.cancel()
            await self._close(failure)

    async def _close(self, failure: TidemillError | None) -> None:
        """Once, whatever happened: bill or write off, tell the client, acknowledge."""
        end: Completed | TidemillError
        try:
            if failure is None:
                end = await self._settle()
            else:
                await self._write_off(failure)
                end = failure
            settled = True
        except TidemillError as error:
            end, settled = error, False
        except Exception as error:
            end, settled = _surprise("settlement failed", error), False
        self._book.end(self.admitted.key)
        if _is_late(end):
            end = DeadlineExceeded("no token was generated before the deadline")
        if isinstance(end, TidemillError):
            end.request_id = self.admitted.ask.request_id
        self.outbox.close(end)
        crash_point("ack.before")
        for attempt in self._serving.finals:
            if settled:
                self._tasks.spawn(attempt.acknowledge(), name="acknowledge")
            else:
                attempt.leave()

    async def _settle(self) -> Completed:
        finish = self._finish()
        return await self._hold.settle(
            self._tally.usage(),
            finish=finish,
            site=self._tally.site,
            timing=self._timing(),
            attempts=max(self._serving.num_attempts, 1),
            busy=self._tally.busy(self._serving.accelerators),
        )

    async def _write_off(self, failure: TidemillError) -> None:
        self._tally.fail()
        busy = self._tally.busy(self._serving.accelerators)
        await self._hold.release(self._tally.usage(), failure, busy=busy)

    def _timing(self) -> Timing:
        serving, began = self._serving, self._admitted_at
        placed_at = began if serving.placed_at is None else serving.placed_at
        first_token_at = began if serving.first_token_at is None else serving.first_token_at
        return Timing(
            queued_us=round((placed_at - began) * 1e6),
            first_token_us=round((first_token_at - began) * 1e6),
            total_us=round((self._clock() - began) * 1e6),
            prefill_us=self._tally.prefilled.prefill_us if self._tally.prefilled else 0,
            decode_busy_seconds=self._tally.busy_seconds,
        )

    def _finish(self) -> Finish:
        """End the choices that still go on; why the last one ended."""
        finish = self._serving.ending or Finish.SERVER_FAULT
        for choice in self._relay.choices:
            self._relay.end(choice, finish)
        return self._relay.last_finish or finish


def _is_late(end: Completed | TidemillError) -> bool:
    """Whether the deadline came before anything that costs."""
    return (
        isinstance(end, Completed) and end.finish is Finish.DEADLINE and not end.usage.prompt_tokens
    )


def _split_of(before: Progress) -> Prefilled:
    """The prompt's split as the router before this one read it."""
    usage = before.usage
    return Prefilled(
        token_ids=(),
        prompt_tokens=usage.prompt_tokens,
        computed_tokens=usage.computed_tokens,
        reused=usage.reused,
        site=before.site,
        prefill_us=0,
    )


def _stopping() -> TidemillError:
    return Unavailable("the router is stopping", reason="ROUTER_STOPPING")


def _surprise(what: str, error: Exception) -> TidemillError:
    internal = Internal("internal error", error_id=uuid.uuid4().hex)
    logger.error(what, exc_info=error, extra=internal.metadata)
    return internal
