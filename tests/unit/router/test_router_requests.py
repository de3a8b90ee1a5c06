from typing import cast

import pytest

from services.router.admission import request_key
from services.router.finish import Completed
from services.router.requests import RequestBook
from services.router.worker_task import wire_id
from tidemill.errors import AlreadyExists, RequestInProgress

DONE = cast(Completed, object())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, *, max_retained: int = 2) -> RequestBook:
    return RequestBook(max_retained, 100.0, clock)


def test_a_running_id_may_not_begin_again() -> None:
    book = make(Clock())
    assert book.begin("a/1", b"body") is None
    with pytest.raises(RequestInProgress) as refused:
        book.begin("a/1", b"body")
    assert refused.value.retry_after_s is not None
    with pytest.raises(AlreadyExists):
        book.begin("a/1", b"another")
    assert len(book) == 1


def test_how_a_request_ended_is_told_to_the_same_body_only() -> None:
    book = make(Clock())
    book.begin("a/1", b"body")
    book.end("a/1", DONE)
    assert book.begin("a/1", b"body") is DONE
    with pytest.raises(AlreadyExists):
        book.begin("a/1", b"another")
    assert len(book) == 0


def test_a_request_that_left_nothing_may_begin_again() -> None:
    book = make(Clock())
    book.begin("a/1", b"body")
    book.end("a/1", None)
    assert book.begin("a/1", b"another") is None


def test_the_oldest_is_forgotten_first_and_all_in_time() -> None:
    clock = Clock()
    book = make(clock)
    for name in ("1", "2", "3"):
        book.begin(name, b"body")
        book.end(name, DONE)
    assert book.begin("1", b"body") is None
    book.end("1", None)
    assert book.begin("3", b"body") is DONE
    clock.now = 101.0
    assert book.begin("3", b"other") is None


def test_names_among_workers_are_short_and_of_one_request_each() -> None:
    tenants = ["a", "a-b", "t" * 63]
    ids = ["1", "b:1", "r" * 64, "h." + "0" * 40]
    names = {wire_id(tenant, id_) for tenant in tenants for id_ in ids}
    assert len(names) == len(tenants) * len(ids)
    assert max(map(len, names)) <= 64
    assert len({request_key(tenant, id_) for tenant in tenants for id_ in ids}) == len(names)
