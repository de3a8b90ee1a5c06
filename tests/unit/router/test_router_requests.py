import pytest

from services.router.admission import request_key
from services.router.requests import RequestBook
from services.router.worker_task import wire_id
from tidemill.errors import AlreadyExists, RequestInProgress


def test_a_running_id_may_not_begin_again() -> None:
    book = RequestBook()
    book.begin("a/1", b"body")
    with pytest.raises(RequestInProgress) as refused:
        book.begin("a/1", b"body")
    assert refused.value.retry_after_s is not None
    with pytest.raises(AlreadyExists):
        book.begin("a/1", b"another")
    assert len(book) == 1


async def test_a_request_that_ended_may_begin_again() -> None:
    book = RequestBook()
    book.begin("a/1", b"body")
    assert not await book.idle_within(0.0)
    book.end("a/1")
    assert await book.idle_within(0.0)
    book.begin("a/1", b"another")


def test_names_among_workers_are_short_and_of_one_request_each() -> None:
    tenants = ["a", "a-b", "t" * 63]
    ids = ["1", "b:1", "r" * 64, "h." + "0" * 40]
    names = {wire_id(tenant, id_) for tenant in tenants for id_ in ids}
    assert len(names) == len(tenants) * len(ids)
    assert max(map(len, names)) <= 64
    assert len({request_key(tenant, id_) for tenant in tenants for id_ in ids}) == len(names)
