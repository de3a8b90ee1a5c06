"""Expected waits: from the pace at which the queue moved, and from nothing else."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.policy import Ahead, QueueModel


class Queue:
    """A model with a clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.model = QueueModel(lambda: self.now)

    def serve(self, flow: str, tokens: int, seconds: float, *, times: int = 1) -> None:
        """Give out requests of the flow, one in so many seconds, while others wait."""
        for _ in range(times):
            self.model.entered(flow)
            self.now += seconds
            self.model.left(flow, tokens)


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_nobody_waits_while_the_head_moves(queue: Queue) -> None:
    queue.model.entered("a")
    assert queue.model.wait_s("a", Ahead(9, 9000, 0)) == 0.0


def test_nothing_is_known_of_a_queue_that_has_just_come_to_stand(queue: Queue) -> None:
    queue.model.entered("a")
    queue.model.sticks(0)
    queue.now += 5
    assert queue.model.wait_s("a", Ahead(1, 1000, 0)) is None


def test_the_wait_is_what_is_ahead_at_the_pace_observed(queue: Queue) -> None:
    queue.model.entered("a")
    queue.model.sticks(0)
    queue.serve("b", 500, 0.1, times=100)
    assert queue.model.wait_s("a", Ahead(4, 10_000, 0)) == pytest.approx(2.0)
    assert queue.model.wait_s("a", Ahead(0, 0, 0)) == 0.0


def test_only_time_in_which_somebody_waited_counts(queue: Queue) -> None:
    queue.model.entered("a")
    queue.model.sticks(0)
    queue.serve("b", 500, 0.1, times=100)
    queue.model.left("a", 0)
    queue.model.moves()
    queue.now += 3.0
    queue.serve("b", 999_999, 0.0)  # whom nobody held up
    queue.model.entered("a")
    queue.model.sticks(0)
    assert queue.model.wait_s("a", Ahead(4, 10_000, 0)) == pytest.approx(2.0)


def test_what_workers_report_counts_until_enough_was_seen(queue: Queue) -> None:
    queue.model.entered("a")
    queue.model.sticks(10_000)
    assert queue.model.wait_s("a", Ahead(1, 5000, 0)) == pytest.approx(0.5)
    queue.serve("b", 500, 0.1, times=600)
    assert queue.model.wait_s("a", Ahead(1, 5000, 0)) == pytest.approx(1.0, rel=0.1)


def test_a_new_pace_is_learned_within_some_half_lives(queue: Queue) -> None:
    queue.model.entered("a")
    queue.model.sticks(0)
    queue.serve("b", 1000, 0.1, times=300)
    queue.serve("b", 100, 0.1, times=300)
    assert queue.model.wait_s("a", Ahead(9, 1000, 0)) == pytest.approx(1.0, rel=1.2)
    queue.serve("b", 100, 0.1, times=300)
    assert queue.model.wait_s("a", Ahead(9, 1000, 0)) == pytest.approx(1.0, rel=0.15)


def test_a_long_queue_of_one_flow_goes_on_at_its_own_pace(queue: Queue) -> None:
    queue.model.entered("heavy")
    queue.model.sticks(0)
    for _ in range(50):  # nine of ten tokens go to others, who come and go
        queue.serve("heavy", 100, 0.1)
        queue.serve("light", 900, 0.1)
    ahead = Ahead(10, 5000, 5000)
    assert queue.model.wait_s("heavy", ahead) == pytest.approx(10.0, rel=0.05)
    queue.model.entered("newcomer")
    assert queue.model.wait_s("newcomer", ahead) == pytest.approx(1.0, rel=0.05)


def test_a_flow_with_nothing_waiting_is_forgotten(queue: Queue) -> None:
    queue.model.entered("a")
    queue.model.entered("a")
    queue.model.left("a", 10)
    with pytest.raises(AssertionError):
        queue.model.check_integrity()
    queue.model.left("a")
    queue.model.check_integrity()


def test_first_tokens_come_after_wait_and_usual_lag_and_seldom_later_than_said(
    queue: Queue,
) -> None:
    model = queue.model
    assert (model.first_token_s(0.0), model.latest_first_token_s(0.0)) == (0.0, 0.0)
    model.began(1.0)
    assert (model.first_token_s(4.0), model.latest_first_token_s(4.0)) == (5.0, 7.0)
    rng = Random(1)
    lags = [rng.gauss(2.0, 0.3) for _ in range(2000)]
    above = 0
    for lag in lags:
        above += lag > queue.model.latest_first_token_s(0.0)
        queue.model.began(lag)
    assert queue.model.first_token_s(0.0) == pytest.approx(2.0, abs=0.4)
    assert above < 0.15 * len(lags)


def test_a_first_token_that_never_came_makes_the_lag_longer_and_never_shorter(
    queue: Queue,
) -> None:
    queue.model.began(1.0)
    queue.model.gave_up(0.1)
    assert queue.model.first_token_s(0.0) == 1.0
    queue.model.gave_up(9.0)
    assert queue.model.first_token_s(0.0) == 2.0


def test_retries_are_due_when_what_waits_is_served_within_bounds(queue: Queue) -> None:
    assert queue.model.retry_after_s(10**9) == 1.0  # no pace known
    queue.model.entered("a")
    queue.model.sticks(0)
    queue.serve("b", 500, 0.1, times=100)
    assert queue.model.retry_after_s(50_000) == pytest.approx(10.0)
    assert queue.model.retry_after_s(50) == 1.0
    assert queue.model.retry_after_s(10**9) == 60.0


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.lists(st.integers(1, 4000), min_size=20, max_size=60),
    rate=st.floats(100, 100_000),
    seed=st.integers(0, 9),
)
def test_at_a_steady_pace_the_estimate_is_what_happens(
    tokens: list[int], rate: float, seed: int
) -> None:
    queue = Queue()
    rng = Random(seed)
    for each in tokens:
        queue.model.entered(str(each % 3))
    queue.model.sticks(0)
    watched = 0.0
    for number, each in enumerate(tokens):
        queue.now += each / rate
        watched += each / rate
        queue.model.left(str(each % 3), each)
        if rng.random() < 0.3 and watched > 1.2 and 8 < number + 1 < len(tokens):
            ahead = Ahead(number, 1000, 0)
            expected = queue.model.wait_s(str(tokens[-1] % 3), ahead)
            assert expected is not None
            assert expected == pytest.approx(1000 / rate, rel=1e-6)
