"""The choices of one request, from worker to worker until each has ended.

One attempt serves all choices. When its worker is lost after tokens came, each choice that goes on
gets attempts of its own, which continue from its own tokens.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from services.router.attempt import Attempt, OpenCall
from services.router.config import LimitsConfig
from services.router.crash_points import crash_point
from services.router.dispatch import Dispatcher
from services.router.finish import Finish
from services.router.fleet import Worker
from services.router.lanes import Lane, share
from services.router.money.hold import Hold
from services.router.money.terms import Progress
from services.router.relay import Choice, Relay
from services.router.reports import Report
from services.router.tally import ChoiceEnded, Ended, Generated, Prefilled, Run
from services.router.tasks import OwnedTasks
from services.router.ticket import Placed, Ticket
from services.router.worker_task import start_message
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.errors import Overloaded, PrefillFull, TidemillError, WorkerLost

_REFUSED_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_LOST_S = 3.0
_STAFFED_POLL_S = 0.2
_FUND_AGAIN_S = 0.2


class Serving:
    """Places, attempts and relays within what `hold` pays for; `ticket` is the place in the queue.

    `ahead` is a call that was opened when the ticket was placed, if one was.
    `finals` are the attempts whose Final is to be acknowledged once it is settled. Instants are
    the clock's: of the placement that led to the first token, and of that token; None before.
    `accelerators` are those of the workers that took part, by id.
    """

    def __init__(
        self,
        hold: Hold,
        ticket: Ticket,
        relay: Relay,
        *,
        ahead: OpenCall | None,
        dispatcher: Dispatcher,
        tasks: OwnedTasks,
        limits: LimitsConfig,
        clock: Callable[[], float],
    ) -> None:
        self.ending: Finish | None = None
        self.finals: list[Attempt] = []
        self.placed_at: float | None = None
        self.first_token_at: float | None = None
        self.accelerators: dict[str, int] = {}
        self._hold = hold
        self._admitted = hold.admitted
        self._relay = relay
        self._tally = relay.tally
        self._dispatcher = dispatcher
        self._tasks = tasks
        self._limits = limits
        self._clock = clock
        self._ahead = ahead
        self._failure: TidemillError | None = None
        self._last_number = hold.next_attempt - 1
        self._unused_numbers: list[int] = []
        self._funding = False
        self._recoveries: list[asyncio.Task[None]] = []
        self._lanes = [Lane(relay.choices, ticket)]

    @property
    def _over(self) -> bool:
        """Whether there is nothing left to pay for."""
        return self.ending is not None or not any(lane.going_on for lane in self._lanes)

    @property
    def num_attempts(self) -> int:
        """Attempts that were not refused, those of routers before this one included."""
        return self._last_number - len(self._unused_numbers)

    def end(self, finish: Finish) -> None:
        """Bring all choices to their end; only the first reason counts."""
        if self.ending is not None:
            return
        self.ending = finish
        for lane in self._lanes:
            self._dispatcher.withdraw(lane.ticket)
            if lane.attempt is not None:
                lane.await_final(self._limits.final_wait_s)
                self._tasks.spawn(lane.attempt.stop(finish), name="stop")

    async def run(self) -> None:
        """Until every choice has ended or `end` was obeyed. Raises why the request fails."""
        try:
            await self._carry(self._lanes[0])
        finally:
            if (unused := self._ahead) is not None:
                self._tasks.spawn(unused.drop(), name="drop call")
        await asyncio.gather(*self._recoveries)
        if self._failure is not None:
            raise self._failure

    def progress(self) -> Progress:
        """How far the request is, for whoever has to finish it."""
        running = {
            lane.number: lane.run.generated
            for lane in self._lanes
            if lane.attempt is not None and lane.run is not None and lane.run.ended is None
        }
        return Progress(
            usage=self._tally.usage(),
            site=self._tally.site,
            attempts=self._last_number,
            running=running,
        )

    async def _carry(self, lane: Lane) -> None:
        """Attempt until the lane's choices have ended, here or each in a lane of its own."""
        try:
            while self.ending is None and lane.going_on and not lane.successors:
                if (placed := await self._place(lane)) is not None:
                    await self._attempt(lane, placed)
        except TidemillError as error:
            if self.ending is None:
                self._failure = error
                self.end(Finish.SERVER_FAULT)
        finally:
            self._dispatcher.release(lane.ticket.key)
            self._lanes.remove(lane)
        self._share_funds()
        async with asyncio.TaskGroup() as group:
            for successor in lane.successors:
                group.create_task(self._carry(successor))

    async def _place(self, lane: Lane) -> Placed | None:
        """Where to attempt next, None if the place was given up; raises why it was taken away.

        Once a worker was lost there must be others, or it is raised again; that all are busy is
        no reason to give up.
        """
        placed = lane.ticket.placed
        patience_s = None if lane.lost is None else self._limits.lost_patience_s
        while not placed.done() and not (await asyncio.wait([placed], timeout=patience_s))[0]:
            if lane.lost is not None and not self._dispatcher.staffed:
                self._dispatcher.withdraw(lane.ticket)
                raise lane.lost
            patience_s = _STAFFED_POLL_S
        if lane.ticket.refusal is not None:
            raise lane.ticket.refusal
        return placed.result()

    async def _attempt(self, lane: Lane, placed: Placed) -> None:
        """One attempt; after it the lane's choices have ended or have places again."""
        try:
            await self._serve(lane, placed)
        except Overloaded as refusal:
            refused_by = placed.decode
            if isinstance(refusal, PrefillFull):
                if placed.prefill is None and not placed.decode.prefills:
                    lane.ticket.in_place = False
                    self._put_back(lane, without=placed.decode, for_s=0)
                    return
                refused_by = placed.prefill or placed.decode
            wait_s = max(refusal.retry_after_s or 0, _REFUSED_S[min(lane.num_refused, 5)])
            lane.num_refused += 1
            self._put_back(lane, without=refused_by, for_s=min(wait_s, _LOST_S))
        except WorkerLost as loss:
            if self.ending is None:
                self._lose(lane, loss, blamed=_blamed(loss, placed))

    async def _serve(self, lane: Lane, placed: Placed) -> None:
        """One attempt, to its Final."""
        if not await self._is_funded(lane):
            for choice in lane.going_on:
                self._relay.end(choice, Finish.BUDGET)
        if self.ending is not None or not lane.going_on:
            return
        run, attempt = self._begin(lane, placed)
        try:
            await self._follow(lane, attempt)
        except Overloaded:
            self._tally.discard(run)
            self._unused_numbers.append(lane.number)
            raise
        except WorkerLost:
            if run.ended is None:
                recovering = self._recover(run, attempt, attempt.recover())
                self._recoveries.append(self._tasks.spawn(recovering, name="recover Final"))
            raise
        finally:
            lane.attempt = lane.patience = None
            await attempt.close()
        self._end_choices(lane)

    async def _follow(self, lane: Lane, attempt: Attempt) -> None:
        """Take in what the worker says, to the end; WorkerLost where a Final is overdue."""
        try:
            async with asyncio.timeout(None) as lane.patience:
                lane.attempt = attempt
                await attempt.follow(partial(self._take, lane, attempt))
        except TimeoutError:
            raise WorkerLost(f"decode worker {attempt.worker.id} sent no Final") from None

    async def _recover(
        self, run: Run, attempt: Attempt, final: Coroutine[Any, Any, Ended | None]
    ) -> None:
        """Count what a lost attempt's worker still tells of it."""
        if (ended := await final) is not None:
            self._tally.recover(run, ended)
            self.finals.append(attempt)

    def _begin(self, lane: Lane, placed: Placed) -> tuple[Run, Attempt]:
        if self.first_token_at is None:
            self.placed_at = self._clock()
        for worker in (placed.decode, placed.prefill or placed.decode):
            self.accelerators[worker.id] = worker.description.accelerators
        lane.number = self._next_number()
        counts = [choice.counts for choice in lane.choices]
        lane.run = self._tally.begin(counts, worker_id=placed.decode.id)
        most = len(lane.choices) * self._admitted.sampling.max_tokens
        start = start_message(
            self._admitted,
            placed,
            lane.choices,
            attempt=lane.number,
            fence=self._hold.fence,
            funded_tokens=None if lane.funded_tokens >= most else lane.funded_tokens,
        )
        call = self._call_to(placed.decode, start.task.id.request_id)
        return lane.run, Attempt(call, start, final_wait_s=self._limits.final_wait_s)

    def _call_to(self, worker: Worker, wire_id: str) -> OpenCall:
        ahead = self._ahead
        if ahead is None or ahead.worker is not worker:
            return OpenCall(worker, wire_id)
        self._ahead = None
        return ahead

    def _next_number(self) -> int:
        """A worker that refuses an attempt forgets it, so its number may be used again."""
        if self._unused_numbers:
            return self._unused_numbers.pop()
        self._last_number += 1
        return self._last_number

    def _take(self, lane: Lane, attempt: Attempt, report: Report) -> None:
        assert lane.run is not None
        match report:
            case Generated():
                self._pass_on(lane, report.choice, report.token_ids, report.logprobs)
            case Prefilled():
                if self.first_token_at is None:
                    self.first_token_at = self._clock()
                self._tally.prefill(lane.run, report)
                self._dispatcher.prefilled(lane.ticket.key)
                self._relay.score_prompt(report.prompt_logprobs)
                for position, token_id in enumerate(report.token_ids):
                    logprobs = report.logprobs[position : position + 1]
                    self._pass_on(lane, position, (token_id,), logprobs)
                self._hold.checkpoint(self.progress)  # once the first tokens are out
                crash_point("prefill_done")
            case ChoiceEnded():
                lane.run.report(report.choice, report.generated_tokens)
                if report.finish is not Finish.SERVER_FAULT or self.ending is not None:
                    self._relay.end(lane.choices[report.choice], report.finish)
            case Ended():
                self._tally.end(lane.run, report)
                self.finals.append(attempt)
        if not self._funding and self._hold.fund_due(self._tally.received):
            self._funding = True
            self._tasks.spawn(self._fund(), name="fund")

    def _pass_on(
        self,
        lane: Lane,
        position: int,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> None:
        """Relay tokens; have the worker end a choice that they bring to a stop string."""
        choice = lane.choices[position]
        going_on = choice.finish is None
        self._relay.push(choice, token_ids, logprobs)
        if not going_on or choice.finish is None or self.ending is not None:
            return
        assert lane.attempt is not None
        assert lane.run is not None
        assert choice.counts.kept is not None
        stop = lane.attempt.stop(
            choice.finish,
            choice.counts.kept - lane.run.relayed[position],
            choice=position if len(lane.choices) > 1 else None,
        )
        self._tasks.spawn(stop, name="stop")
        if not lane.going_on:
            lane.await_final(self._limits.final_wait_s)
        if self._relay.all_ended:
            self.ending = choice.finish

    def _lose(self, lane: Lane, loss: WorkerLost, *, blamed: Worker) -> None:
        """Give each choice that lacks something a place again; raise `loss` once too often."""
        assert lane.run is not None
        self._tally.lose(lane.run)
        for choice in lane.going_on:
            if (finish := self._completed(choice)) is not None:
                self._relay.end(choice, finish)
        if not lane.going_on:
            return
        if lane.num_lost >= self._limits.max_lost_attempts:
            raise loss
        lane.num_lost += 1
        lane.lost = loss
        if not any(choice.token_ids for choice in lane.choices):
            self._put_back(lane, without=blamed, for_s=_LOST_S)
            return
        lane.successors = [self._alone(lane, choice) for choice in lane.going_on]
        for successor in lane.successors:
            self._put_back(successor, without=blamed, for_s=_LOST_S)
        self._lanes += lane.successors

    async def _is_funded(self, lane: Lane) -> bool:
        """Whether a further token of the lane is paid for."""
        self._share_funds()
        if lane.funded_tokens <= lane.received and await self._hold.fund(self.progress()):
            self._share_funds()
        return lane.funded_tokens > lane.received

    async def _fund(self) -> None:
        """Have more tokens paid for; while all stand still for want of funds, ask again."""
        self._funding = True
        try:
            while await self._hold.fund(self.progress()) is None:
                if self._over or self._tally.received < self._hold.funded_tokens:
                    return
                await asyncio.sleep(_FUND_AGAIN_S)
            self._share_funds()
        finally:
            self._funding = False

    def _share_funds(self) -> None:
        """Give what no lane has yet to those that go on; what is given stays until a lane ends."""
        elsewhere = self._tally.received - sum(lane.received for lane in self._lanes)
        given = sum(lane.funded_tokens for lane in self._lanes)
        spare = self._hold.funded_tokens - elsewhere - given
        lanes = [lane for lane in self._lanes if lane.going_on and not lane.successors]
        for lane in share(lanes, spare, max_tokens=self._admitted.sampling.max_tokens):
            if lane.attempt is not None:
                self._tasks.spawn(lane.attempt.fund(lane.funded_tokens), name="fund")

    def _completed(self, choice: Choice) -> Finish | None:
        """Why the choice's tokens are all there is, though no Final said so; None if not."""
        sampling = self._admitted.sampling
        if choice.token_ids and choice.token_ids[-1] in sampling.stop_token_ids:
            return Finish.STOP
        if len(choice.token_ids) >= sampling.max_tokens:
            return Finish.LENGTH
        return None

    def _alone(self, lane: Lane, choice: Choice) -> Lane:
        """A lane in which a choice goes on from its own tokens."""
        admitted = self._admitted
        ticket = replace(
            lane.ticket,
            key=f"{admitted.key}#{choice.index}",
            num_prompt_tokens=len(admitted.token_ids) + len(choice.token_ids),
            max_tokens=admitted.sampling.max_tokens - len(choice.token_ids),
            block_hashes=admitted.chain(choice.token_ids),
            excluded=dict(lane.ticket.excluded),
        )
        received = choice.counts.received
        return Lane([choice], ticket, received, num_lost=lane.num_lost, lost=lane.lost)

    def _put_back(self, lane: Lane, *, without: Worker, for_s: float) -> None:
        if self.ending is None:
            self._dispatcher.put_back(lane.ticket, without=without.id, for_s=for_s)

    def _end_choices(self, lane: Lane) -> None:
        """The attempt has ended as it should: a stop string won, else what Final says."""
        if lane.run is None or lane.run.ended is None:
            return
        for choice in lane.choices:
            self._dispatcher.answered(len(choice.token_ids))
        finish = lane.run.ended.finish
        if finish is not Finish.SERVER_FAULT:
            for choice in lane.going_on:
                self._relay.end(choice, finish)


def _blamed(loss: WorkerLost, placed: Placed) -> Worker:
    """The worker that was lost: the prefill worker where the decode worker says so."""
    named = loss.metadata.get("worker_id")
    if placed.prefill is not None and named == placed.prefill.id:
        return placed.prefill
    return placed.decode
