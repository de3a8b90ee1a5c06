"""One admitted request, from its place in the queue to its bill.

It runs in a task that the client's call does not own: a client that vanishes ends the request, and
never its settlement.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable

from services.router.admission import Admitted
from services.router.config import LimitsConfig
from services.router.dispatch import Dispatcher, Ticket
from services.router.finish import Completed, Finish, Timing
from services.router.outbox import Outbox
from services.router.relay import Relay
from services.router.requests import RequestBook
from services.router.serving import Serving
from services.router.settle import Settler
from services.router.tasks import OwnedTasks
from tidemill.billing import Usage
from tidemill.errors import DeadlineExceeded, Internal, TidemillError, Unavailable

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
        self._over = False
        self._admitted_at = clock()

    def start(self) -> None:
        """Take a place in the queue and run; QueueFull if there is none."""
        loop = asyncio.get_running_loop()
        ticket = Ticket(
            key=self.admitted.key,
            tenant_id=self.admitted.tenant.id,
            num_prompt_tokens=len(self.admitted.token_ids),
            max_tokens=self.admitted.sampling.max_tokens,
            block_hashes=self.admitted.block_hashes,
            moved=self.outbox.move,
            placed=loop.create_future(),
        )
        position = self._dispatcher.enqueue(ticket)
        self._serving = Serving(
            self.admitted,
            ticket,
            self._relay,
            dispatcher=self._dispatcher,
            tasks=self._tasks,
            limits=self._limits,
            clock=self._clock,
        )
        self.outbox.accept(position)
        self._timers = [
            loop.call_later(self.admitted.first_token_timeout_s, self._first_token_is_late),
            loop.call_later(self.admitted.total_timeout_s, self.end, Finish.DEADLINE),
        ]
        self._tasks.spawn(self._run(), name=f"generation {self.admitted.key}")

    def end(self, finish: Finish) -> None:
        """Bring the request to its end; only the first reason counts."""
        if not self._over:
            self._serving.end(finish)

    def _first_token_is_late(self) -> None:
        if not self._tally.received:
            self.end(Finish.DEADLINE)

    async def _run(self) -> None:
        failure: TidemillError | None = None
        try:
            await self._serving.run()
            if self._serving.ending is Finish.SERVER_FAULT:
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

    def _settle(self, failure: TidemillError | None) -> None:
        """Once, whatever happened: write off or bill, remember, tell the client, acknowledge."""
        if failure is not None:
            self._tally.fail()
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
        for attempt in self._serving.finals:
            self._tasks.spawn(attempt.acknowledge(), name="acknowledge")

    def _bill(self, usage: Usage, finish: Finish) -> Completed:
        serving, began = self._serving, self._admitted_at
        now = self._clock()
        placed_at = began if serving.placed_at is None else serving.placed_at
        first_token_at = began if serving.first_token_at is None else serving.first_token_at
        timing = Timing(
            queued_us=round((placed_at - began) * 1e6),
            first_token_us=round((first_token_at - began) * 1e6),
            total_us=round((now - began) * 1e6),
            prefill_us=self._tally.prefilled.prefill_us if self._tally.prefilled else 0,
            decode_busy_seconds=self._tally.busy_seconds,
        )
        return self._settler.settle(
            self.admitted,
            usage,
            finish=finish,
            site=self._tally.site,
            timing=timing,
            attempts=max(serving.num_attempts, 1),
        )

    def _finish(self) -> Finish:
        """End the choices that still go on; why the last one ended."""
        finish = self._serving.ending or Finish.SERVER_FAULT
        for choice in self._relay.choices:
            self._relay.end(choice, finish)
        return self._relay.last_finish or finish
