from tidemill.kv.breaker import Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_after_a_failure_nobody_is_let_through_until_the_pause_is_over() -> None:
    clock = Clock()
    breaker = Breaker(1.0, 4.0, clock=clock)
    assert breaker.admits()
    breaker.failed()
    assert not breaker.closed
    assert not breaker.admits()
    assert breaker.retry_after_s() == 1.0
    clock.now += 1.0
    assert breaker.admits()
    assert not breaker.admits(), "one probe at a time"


def test_the_pause_doubles_up_to_its_bound_and_starts_over_after_a_success() -> None:
    clock = Clock()
    breaker = Breaker(1.0, 4.0, clock=clock)
    breaker.failed()
    pauses = []
    for _ in range(4):
        pauses.append(breaker.retry_after_s())
        clock.now += pauses[-1]
        assert breaker.admits()
        breaker.failed()
    assert pauses == [1.0, 2.0, 4.0, 4.0]
    clock.now += 4.0
    assert breaker.admits()
    breaker.succeeded()
    assert breaker.closed
    assert breaker.admits()
    breaker.failed()
    assert breaker.retry_after_s() == 1.0


def test_calls_that_fail_together_count_once() -> None:
    breaker = Breaker(1.0, 4.0, clock=Clock())
    for _ in range(5):
        breaker.failed()
    assert breaker.retry_after_s() == 1.0


def test_a_probe_that_never_reports_lets_another_go_later() -> None:
    clock = Clock()
    breaker = Breaker(1.0, 4.0, clock=clock)
    breaker.failed()
    clock.now += 1.0
    assert breaker.admits()
    clock.now += 1.0
    assert breaker.admits()
