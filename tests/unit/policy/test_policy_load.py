"""A router's own dispatches count until the worker's report shows them."""

from tidemill.policy import InFlight, Work, WorkerLoad


def report(worker_id: str, observed_at: float) -> WorkerLoad:
    return WorkerLoad(worker_id=worker_id, epoch=1, sequence=1, observed_at=observed_at)


def test_work_counts_until_a_report_that_can_show_it() -> None:
    own = InFlight(settle_s=0.1)
    own.add("r1", "a", at=10.0, tokens=100, blocks=2)
    own.add("r2", "a", at=11.0, tokens=50, blocks=1)
    assert own.unreported(report("a", 9.0)) == Work(requests=2, tokens=150, blocks=3)
    assert own.unreported(report("a", 10.05)) == Work(requests=2, tokens=150, blocks=3)
    assert own.unreported(report("a", 10.5)) == Work(requests=1, tokens=50, blocks=1)
    assert own.unreported(report("a", 12.0)) == Work()
    assert own.unreported(report("b", 0.0)) == Work()


def test_an_ended_request_is_gone_from_all_its_workers() -> None:
    own = InFlight()
    own.add("r1", "prefill", at=1.0, tokens=100)
    own.add("r1", "decode", at=1.0, blocks=3)
    assert len(own) == 1
    own.remove("r1")
    own.remove("r1")
    assert len(own) == 0
    assert own.unreported(report("prefill", 0.0)) == own.unreported(report("decode", 0.0)) == Work()


def test_a_second_dispatch_to_the_same_worker_replaces_the_first() -> None:
    own = InFlight()
    own.add("r1", "a", at=1.0, tokens=100)
    own.add("r2", "a", at=2.0, tokens=1)
    own.add("r1", "a", at=3.0, tokens=7)
    assert own.unreported(report("a", 2.5)) == Work(requests=1, tokens=7)
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
    assert own.unreported(report("a", 0.0)) == Work()
    assert own.unreported(report("b", 0.0)) == Work(requests=1, tokens=2)
    assert len(own) == 1
    own.remove("r2")
    own.remove("r1")
    assert len(own) == 0
