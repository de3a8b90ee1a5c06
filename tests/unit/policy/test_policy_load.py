"""A router's own dispatches count until the worker's report shows them."""

import math

import pytest

from tidemill.policy import InFlight, OutputLengths, ReportClock, Work, WorkerLoad


def report(worker_id: str, observed_at: float) -> WorkerLoad:
    return WorkerLoad(worker_id=worker_id, epoch=1, sequence=1, observed_at=observed_at)


def unreported(own: InFlight, load: WorkerLoad) -> Work:
    return Work.sum(dispatch.work for dispatch in own.unreported(load))


def test_work_counts_until_a_report_that_can_show_it() -> None:
    own = InFlight(settle_s=0.1)
    own.add("r1", "a", at=10.0, tokens=100, blocks=2)
    own.add("r2", "a", at=11.0, tokens=50, blocks=1)
    assert unreported(own, report("a", 9.0)) == Work(requests=2, tokens=150, blocks=3)
    assert unreported(own, report("a", 10.05)) == Work(requests=2, tokens=150, blocks=3)
    assert unreported(own, report("a", 10.5)) == Work(requests=1, tokens=50, blocks=1)
    assert unreported(own, report("a", 12.0)) == Work()
    assert unreported(own, report("b", 0.0)) == Work()


def test_an_ended_request_is_gone_from_all_its_workers() -> None:
    own = InFlight()
    own.add("r1", "prefill", at=1.0, tokens=100)
    own.add("r1", "decode", at=1.0, blocks=3)
    assert len(own) == 1
    own.remove("r1")
    own.remove("r1")
    assert len(own) == 0
    assert (
        unreported(own, report("prefill", 0.0)) == unreported(own, report("decode", 0.0)) == Work()
    )


def test_a_second_dispatch_to_the_same_worker_replaces_the_first() -> None:
    own = InFlight()
    own.add("r1", "a", at=1.0, tokens=100)
    own.add("r2", "a", at=2.0, tokens=1)
    own.add("r1", "a", at=3.0, tokens=7)
    assert unreported(own, report("a", 2.5)) == Work(requests=1, tokens=7)
    own.remove("r1")
    own.remove("r2")
    assert len(own) == 0


def test_a_lost_worker_takes_only_its_own_dispatches_with_it() -> None:
    own = InFlight()
    own.add("r1", "a", at=1.0, tokens=1)
    own.add("r1", "b", at=1.0, tokens=2)
    own.add("r2", "a", at=1.0, tokens=4)
    own.forget("a")
    own.forget("unknown")
    assert unreported(own, report("a", 0.0)) == Work()
    assert unreported(own, report("b", 0.0)) == Work(requests=1, tokens=2)
    assert len(own) == 1
    own.remove("r2")
    own.remove("r1")
    assert len(own) == 0


def test_unreported_dispatches_come_in_the_order_in_which_they_were_sent() -> None:
    own = InFlight()
    for number in range(3):
        own.add(str(number), "a", at=10.0 + number, pairs=number)
    sent = own.unreported(report("a", 10.5))
    assert [(each.at, each.work.pairs) for each in sent] == [(11.0, 1), (12.0, 2)]


def test_a_worker_is_idle_since_it_was_last_given_something_that_is_over() -> None:
    own = InFlight()
    assert own.idle_s("a", now=50.0) == math.inf
    own.add("r1", "a", at=10.0)
    assert own.idle_s("a", now=50.0) == 0.0
    own.remove("r1")
    assert own.idle_s("a", now=50.0) == 40.0
    own.forget("a")
    assert own.idle_s("a", now=50.0) == math.inf


def test_routers_are_told_by_whose_the_reported_requests_are() -> None:
    own = InFlight()
    loads = [report("a", 20.0), report("b", 20.0)]
    for number in range(38):
        own.add(str(number), "ab"[number % 2], at=10.0)
    own.add("new", "a", at=20.0)
    unreported = [own.unreported(load) for load in loads]
    assert own.num_routers(loads, unreported, 38) == 1.0
    assert own.num_routers(loads, unreported, 4 * 38) == pytest.approx(4, rel=0.05)
    assert own.num_routers(loads, unreported, 10) == 1.0, "reports lag behind what has begun"
    assert own.num_routers(loads, unreported, 10_000) == 16.0
    assert InFlight().num_routers([], [], 0) == 1.0


def test_answers_are_expected_to_be_as_long_as_they_were_lately_or_as_allowed() -> None:
    lengths = OutputLengths(prior=100, half_life=1)
    assert lengths.expected(4096) == 100
    assert lengths.expected(8) == 8
    for _ in range(30):
        lengths.add(300)
    assert lengths.expected(4096) == 300
    assert lengths.remaining == pytest.approx(150)


def test_an_answer_met_under_way_is_likely_a_long_one() -> None:
    lengths = OutputLengths(half_life=10_000)
    for _ in range(5000):
        lengths.add(0)
        lengths.add(400)
    assert lengths.expected(4096) == pytest.approx(200, rel=0.02)
    assert lengths.remaining == pytest.approx(200, rel=0.02)


def test_a_report_that_waited_somewhere_is_as_old_as_it_is() -> None:
    clock = ReportClock()
    assert clock.made_at(5.0, now=105.002) == pytest.approx(105.002)
    assert clock.made_at(6.0, now=106.001) == pytest.approx(106.001), "the quickest so far"
    assert clock.made_at(7.0, now=107.5) == pytest.approx(107.001, abs=0.01)
    assert clock.made_at(8.0, now=108.001) == pytest.approx(108.001, abs=0.01)


def test_clocks_that_drift_apart_make_no_report_old() -> None:
    clock = ReportClock()
    for second in range(5000):
        now = 1000 + second * 1.0005
        assert clock.made_at(1.0 + second, now=now) == pytest.approx(now, abs=0.001)


def test_a_report_without_a_clock_was_made_when_it_came() -> None:
    clock = ReportClock()
    assert [clock.made_at(0.0, now=now) for now in (7.0, 9.5)] == [7.0, 9.5]
