"""The line in front of the dispatcher: places, expected waits, deadlines that cannot be met."""

import asyncio
from typing import Any

import pytest

from services.router.ticket import Place, Ticket
from services.router.waiting import WaitingLine
from tidemill.errors import DeadlineUnreachable, QueueFull
from tidemill.policy import Priority, QueueLimits


class Line:
    """A line whose head is given out at a steady pace of 1000 tokens a second."""

    def __init__(self, **limits: Any) -> None:
        self.now = 100.0
        self.line = WaitingLine(QueueLimits(**limits), lambda: self.now)
        self.told: list[tuple[str, int, float | None]] = []
        self._number = 0

    def ticket(self, tenant: str = "alice", cost: int = 100, **fields: Any) -> Ticket:
        self._number += 1
        key = f"r{self._number}"
        return Ticket(
            key=key,
            tenant_id=tenant,
            num_prompt_tokens=cost,
            max_tokens=8,
            block_hashes=(),
            moved=lambda position, wait_s: self.told.append((key, position, wait_s)),
            placed=asyncio.get_running_loop().create_future(),
            cost_tokens=cost,
            **fields,
        )

    def join(self, ticket: Ticket) -> Ticket:
        self.line.join(ticket, others_first=0)
        self.line.settle(0)
        return ticket

    def serve(self) -> Ticket:
        head = self.line.head()
        assert head is not None
        self.now += head.cost_tokens / 1000
        self.line.give_out(head)
        self.line.settle(0)
        return head

    def warm_up(self, *, lag_s: float = 0.5) -> None:
        """Let the pace and the lag be known: others wait all the time."""
        self.join(self.ticket("other"))
        for _ in range(60):
            self.join(self.ticket("other"))
            key = self.serve().key
            self.now += lag_s
            self.line.began(key)
            self.now -= lag_s


@pytest.fixture
async def line() -> Line:
    return Line(saved_turns=0, quantum_tokens=100)


async def test_a_place_says_what_is_ahead_and_for_how_long(line: Line) -> None:
    line.warm_up()
    first = line.join(line.ticket(cost=3000))
    second = line.join(line.ticket(cost=10))
    assert first.place.position == 1
    assert first.place.wait_s == pytest.approx(0.1, rel=0.05)
    assert second.place.position == 2
    assert second.place.wait_s == pytest.approx(3.1, rel=0.05)


async def test_who_would_be_too_late_is_refused_with_the_estimate(line: Line) -> None:
    line.warm_up(lag_s=0.5)
    line.join(line.ticket(cost=3000))
    soon = line.ticket(deadline=line.now + 2.0)
    with pytest.raises(DeadlineUnreachable, match=r"expected in 3\.. s or later") as caught:
        line.join(soon)
    assert 3500 <= int(caught.value.metadata["expected_first_token_ms"]) <= 3700
    assert caught.value.metadata["left_ms"] == "2000"
    assert caught.value.metadata["position"] == "2"
    assert caught.value.retry_after_s == pytest.approx(0.25 * 3.1 + 1.6, abs=0.3)
    assert len(line.line) == 2
    line.join(line.ticket(deadline=line.now + 6.0))


async def test_nobody_is_refused_while_it_is_not_known_how_long_it_takes(line: Line) -> None:
    line.join(line.ticket(cost=1_000_000))
    line.join(line.ticket(deadline=line.now + 0.1))


async def test_nobody_is_refused_where_nobody_waits(line: Line) -> None:
    line.warm_up(lag_s=5.0)
    while len(line.line):
        line.serve()
    burst = [line.ticket(deadline=line.now + 0.1) for _ in range(3)]
    for ticket in burst:
        line.line.join(ticket, others_first=0)
    assert line.line.head() is burst[0]
    assert [ticket.refusal for ticket in burst] == [None] * 3


async def test_who_has_become_too_late_leaves_the_line_for_those_who_are_not(line: Line) -> None:
    line.warm_up(lag_s=1.0)
    while len(line.line):
        line.serve()
    hasty = line.join(line.ticket(deadline=line.now + 4.0))
    patient = line.join(line.ticket())
    line.now += 3.5
    assert line.line.head() is patient
    assert hasty.placed.result() is None
    assert isinstance(hasty.refusal, DeadlineUnreachable)
    line.serve()
    alone = line.join(line.ticket(deadline=line.now + 0.1))
    assert line.line.head() is alone


async def test_a_full_line_says_when_to_ask_again(line: Line) -> None:
    line.line = WaitingLine(QueueLimits(max_requests=3), lambda: line.now)
    line.warm_up()
    line.join(line.ticket(cost=4900))
    line.join(line.ticket("bob"))
    with pytest.raises(QueueFull) as caught:
        line.join(line.ticket("carol"))
    assert caught.value.retry_after_s == pytest.approx(5.1, rel=0.05)


async def test_places_are_told_when_they_have_changed_by_a_tenth(line: Line) -> None:
    line.warm_up()
    tickets = [line.join(line.ticket()) for _ in range(40)]
    line.told.clear()
    line.serve()
    line.line.tell(others_first=0)
    heard = {key for key, _, _ in line.told}
    assert tickets[3].key in heard
    assert tickets[39].key not in heard
    place = tickets[3].place
    assert (tickets[3].key, place.position, place.wait_s) in line.told
    line.told.clear()
    line.serve()
    line.line.tell(others_first=0)  # 0.1 s later
    assert line.told == []


async def test_others_first_count_into_the_position(line: Line) -> None:
    line.line.join(line.ticket(), others_first=3)
    ticket = line.ticket()
    line.line.join(ticket, others_first=3)
    assert ticket.place.position == 4


async def test_batch_waits_for_standard(line: Line) -> None:
    batch = [line.join(line.ticket(priority=Priority.BATCH)) for _ in range(3)]
    standard = [line.join(line.ticket()) for _ in range(9)]
    assert [line.serve() for _ in range(12)] == standard + batch


async def test_nothing_is_left_of_those_who_gave_up_or_ended(line: Line) -> None:
    line.warm_up()
    waiting = line.join(line.ticket())
    while (served := line.serve()) is not waiting:
        pass
    line.join(leaving := line.ticket())
    line.line.leave(leaving)
    line.line.leave(leaving)
    with pytest.raises(AssertionError):
        line.line.check_integrity()
    line.line.ended(served.key)
    while (head := line.line.head()) is not None:
        line.line.give_out(head)
        line.line.ended(head.key)
    for number in range(100):
        line.line.ended(f"r{number}")
    line.line.check_integrity()


@pytest.mark.parametrize(
    ("told", "now", "tells"),
    [
        (Place(100, 50.0), Place(91, 46.0), False),
        (Place(100, 50.0), Place(90, 50.0), True),
        (Place(100, 50.0), Place(100, 45.0), True),
        (Place(100, None), Place(100, 45.0), True),
        (Place(3, 0.2), Place(3, 0.6), False),
        (Place(3, 0.2), Place(3, 0.8), True),
        (Place(1, 0.2), Place(0, 0.2), True),
        (Place(0, 0.0), Place(0, 0.0), False),
    ],
)
def test_a_change_of_a_tenth_is_worth_telling(told: Place, now: Place, tells: bool) -> None:
    assert now.tells_more_than(told) is tells
