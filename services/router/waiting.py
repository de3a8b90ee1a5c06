"""The line in front of the dispatcher: who is next, who waits how long, who would be too late."""

from collections.abc import Callable

from services.router.ticket import Place, Ticket
from tidemill.errors import DeadlineUnreachable, QueueFull
from tidemill.policy import Ahead, FairQueue, QueueLimits, QueueModel
from tidemill.policy.queue_model import within_bounds

_TELL_EVERY_S = 0.2


class WaitingLine:
    """A fair queue of tickets that tells each what to expect; `clock` is in seconds."""

    def __init__(self, limits: QueueLimits, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._queue: FairQueue[Ticket] = FairQueue(limits)
        self._model = QueueModel(clock)
        self._tickets: dict[str, Ticket] = {}
        self._given_out: dict[str, float] = {}  # since when, until the first token
        self._told_at = 0.0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        """Uncached prompt tokens of those that wait."""
        return self._queue.queued_tokens

    def require_room(self, tenant_id: str, cost_tokens: int = 1) -> None:
        """QueueFull, and when to ask again, if a request of that cost would find no place."""
        try:
            self._queue.require_room(tenant_id, cost_tokens)
        except QueueFull as full:
            full.retry_after_s = self._model.retry_after_s(self.queued_tokens)
            raise

    def join(self, ticket: Ticket, *, others_first: int) -> None:
        """Give the ticket a place behind `others_first` that are not in this line.

        QueueFull if there is none, DeadlineUnreachable if its first token would come too late;
        both say when to ask again.
        """
        self.require_room(ticket.tenant_id, ticket.cost_tokens)
        self._queue.push(ticket.key, ticket.tenant_id, ticket.cost_tokens, ticket, ticket.priority)
        self._model.entered(ticket.flow)
        self._tickets[ticket.key] = ticket
        ticket.place = self._place(ticket, self._queue.ahead(ticket.key), others_first)
        wait_s = ticket.place.wait_s
        if wait_s and self._too_late(ticket, wait_s):
            self.leave(ticket)
            raise self._unreachable(ticket, wait_s)

    def leave(self, ticket: Ticket) -> None:
        """Give the place up; nothing happens to a ticket that has none."""
        if self._queue.remove(ticket.key):
            del self._tickets[ticket.key]
            self._model.left(ticket.flow)

    def head(self) -> Ticket | None:
        """The next ticket; one that would be too late even now is sent away if others wait.

        Only where the head has been waiting for room: a burst that meets idle workers is tried.
        """
        while (head := self._queue.peek()) is not None:
            others = self._model.stuck and len(self._queue) > 1
            if not others or not self._too_late(head, 0.0):
                return head
            self.leave(head)
            head.refusal = self._unreachable(head, 0.0)
            if not head.placed.done():
                head.placed.set_result(None)
        return None

    def give_out(self, ticket: Ticket) -> None:
        """The head was placed."""
        popped = self._queue.pop()
        assert popped is ticket
        del self._tickets[ticket.key]
        self._model.left(ticket.flow, ticket.cost_tokens)
        self._given_out[ticket.key] = self._clock()

    def settle(self, prefill_tokens_per_s: float) -> None:
        """As many were given out as there is room for; workers report that pace, or 0."""
        if len(self._queue):
            self._model.sticks(prefill_tokens_per_s)
        else:
            self._model.moves()

    def began(self, key: str) -> None:
        """The first token has come of a request that was given out."""
        if (since := self._given_out.pop(key, None)) is not None:
            self._model.began(self._clock() - since)

    def ended(self, key: str) -> None:
        """A request that was given out is over; if its first token never came, it took as long."""
        if (since := self._given_out.pop(key, None)) is not None:
            self._model.gave_up(self._clock() - since)

    def tell(self, *, others_first: int) -> None:
        """Tell those whose place has changed, now and then."""
        now = self._clock()
        if not len(self._queue) or now - self._told_at < _TELL_EVERY_S:
            return
        self._told_at = now
        for key, ahead in self._queue.all_ahead().items():
            ticket = self._tickets[key]
            place = self._place(ticket, ahead, others_first)
            if place.tells_more_than(ticket.place):
                ticket.place = place
                ticket.moved(place.position, place.wait_s)

    def check_integrity(self) -> None:
        """That nobody waits, and nothing is left of anybody who did (R1)."""
        assert not len(self._queue)
        assert not self._tickets
        assert not self._given_out
        self._model.check_integrity()

    def _place(self, ticket: Ticket, ahead: Ahead, others_first: int) -> Place:
        return Place(others_first + ahead.requests, self._model.wait_s(ticket.flow, ahead))

    def _too_late(self, ticket: Ticket, wait_s: float) -> bool:
        return self._clock() + self._model.latest_first_token_s(wait_s) > ticket.deadline

    def _unreachable(self, ticket: Ticket, wait_s: float) -> DeadlineUnreachable:
        left_s = ticket.deadline - self._clock()
        first_token_s = self._model.first_token_s(wait_s)
        late_s = self._model.latest_first_token_s(wait_s) - left_s
        return DeadlineUnreachable(
            f"{left_s:.1f} s are left, a first token is expected in {first_token_s:.1f} s or later",
            metadata={
                "expected_first_token_ms": str(round(first_token_s * 1000)),
                "left_ms": str(round(max(left_s, 0.0) * 1000)),
                "position": str(ticket.place.position),
            },
            retry_after_s=within_bounds(late_s),
        )
