"""The router's link keeps its index true to a worker over a stream that breaks and loses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from services.router import kv_watch
from services.router.kv_watch import watch_kv
from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tidemill.policy import PrefixIndex, TierOverlap

EPOCH = 5


def told(sequence: int, *names: int, resets: bool = False, **change: Any) -> pb.WatchKvResponse:
    changes = [pb.KvChange(**{"tier": pb.KV_TIER_DEVICE, "blocks": names, **change})]
    return pb.WatchKvResponse(epoch=EPOCH, sequence=sequence, resets=resets, changes=changes)


class Teller:
    """Answers each WatchKv with the next script, then, unless it `stays`, hangs up but the last.

    A script that begins with None is refused.
    """

    def __init__(self, *scripts: list[pb.WatchKvResponse | None], stays: bool = False) -> None:
        self.scripts = list(scripts)
        self.stays = stays
        self.asked: list[tuple[int, int] | None] = []

    async def watch_kv(
        self, request: pb.WatchKvRequest, context: Any
    ) -> AsyncIterator[pb.WatchKvResponse]:
        seen = (request.epoch, request.after_sequence) if request.HasField("epoch") else None
        self.asked.append(seen)
        for message in self.scripts.pop(0):
            if message is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            else:
                yield message
        if self.stays or not self.scripts:
            await asyncio.Event().wait()


@asynccontextmanager
async def watched(teller: Teller | None) -> AsyncIterator[tuple[PrefixIndex, "asyncio.Task[None]"]]:
    server = grpc.aio.server()
    handlers = {}
    if teller is not None:
        handlers["WatchKv"] = grpc.unary_stream_rpc_method_handler(
            teller.watch_kv,
            request_deserializer=pb.WatchKvRequest.FromString,
            response_serializer=pb.WatchKvResponse.SerializeToString,
        )
    service = pb.DESCRIPTOR.services_by_name["WorkerService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    index = PrefixIndex()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = WorkerServiceStub(channel)
        task = asyncio.create_task(watch_kv(stub, "w", index))
        yield index, task
        task.cancel()
        await asyncio.wait([task])
    await server.stop(None)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - what changes is no event of ours
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_watch, "_AGAIN_S", 0.01)


async def test_a_stream_that_ends_is_resumed_after_what_was_heard() -> None:
    teller = Teller(
        [told(3, 1, 2, resets=True), told(4, 3)],
        [told(5, 3, 2, removed=True), told(6, 2, tier=pb.KV_TIER_HOST)],
    )
    async with watched(teller) as (index, _):
        await eventually(lambda: index.heard("w") == (EPOCH, 6))
        assert index.overlap([1, 2, 3], 0.0) == {"w": TierOverlap(1, 1)}
        assert teller.asked == [None, (EPOCH, 4)]


async def test_after_a_gap_the_router_asks_for_what_it_missed() -> None:
    teller = Teller(
        [told(1, 1, resets=True), told(3, 3), told(4, 4)],
        [told(2, 2), told(3, 3), told(4, 4)],
        stays=True,
    )
    async with watched(teller) as (index, _):
        await eventually(lambda: index.heard("w") == (EPOCH, 4))
        assert index.overlap([1, 2, 3, 4], 0.0) == {"w": TierOverlap(4)}
        assert teller.asked == [None, (EPOCH, 1)]


async def test_a_tier_that_this_router_does_not_know_is_passed_over() -> None:
    teller = Teller([told(1, 1, resets=True), told(2, 2, tier=17), told(3, 3)])
    async with watched(teller) as (index, _):
        await eventually(lambda: index.heard("w") == (EPOCH, 3))
        assert index.overlap([2], 0.0) == {}
        assert index.overlap([3], 0.0) == {"w": TierOverlap(1)}


async def test_a_worker_without_the_method_is_left_alone() -> None:
    async with watched(None) as (index, task):
        await asyncio.wait_for(asyncio.shield(task), 5)
        assert index.heard("w") is None


async def test_a_worker_that_is_away_for_a_moment_is_asked_again() -> None:
    async with watched(Teller([None], [told(1, 1, resets=True)])) as (index, _):
        await eventually(lambda: index.heard("w") == (EPOCH, 1))
