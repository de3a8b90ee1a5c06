import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from tests.unit.rpc.serving import echo, method, serving
from tidemill.errors import Overloaded
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.interceptors import Call
from tidemill.rpc.places import Shares
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.status import from_rpc_error

Context = grpc.aio.ServicerContext[bytes, bytes]
WHO = "x-who"
NO_RETRIES = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))


def holder(call: Call) -> str | None:
    """Whom the call says that it is from."""
    metadata = call.context.invocation_metadata() or ()
    return next((str(value) for key, value in metadata if key == WHO), None)


@dataclass
class Port:
    """A server whose calls last until `release`."""

    channel: grpc.aio.Channel
    release: asyncio.Event
    calls: list[Any] = field(default_factory=list)

    async def hold(self, number: int, who: str = "") -> int:
        """Make so many calls one after the other; how many got a place."""
        return sum([await self.one(who) for _ in range(number)])

    async def one(self, who: str = "") -> bool:
        """Whether one more call got a place."""
        metadata = ((WHO, who),) if who else ()
        call = method(self.channel, "Stream")(b"", metadata=metadata, timeout=30)
        try:
            assert await call.read() == b"held"
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            assert isinstance(error, Overloaded), error
            assert error.retry_after_s
            return False
        self.calls.append(call)
        return True


@asynccontextmanager
async def port(most: int, *guards: Any) -> AsyncIterator[Port]:
    release = asyncio.Event()

    async def hold(request: bytes, context: Context) -> AsyncIterator[bytes]:
        yield b"held"
        await release.wait()

    config = ServerConfig(max_concurrent_rpcs=most, drain_s=0)
    async with (
        serving(config, guards=guards, stream=hold) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        yield Port(channel, release)


async def again(attempt: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(5):
        while not await attempt():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def test_calls_beyond_the_cap_are_told_when_to_come_again() -> None:
    async with port(8) as server:
        assert await server.hold(10) == 8


@pytest.mark.parametrize("how", ["ended", "given up"])
async def test_a_place_is_free_again_once_its_call_is_over(how: str) -> None:
    async with port(2) as server:
        assert await server.hold(2) == 2
        if how == "ended":
            server.release.set()
        else:
            server.calls[0].cancel()
        await again(server.one)


async def test_nobody_gets_all_the_places() -> None:
    async with port(16, Shares(16, holder)) as server:
        assert await server.hold(20, "one") == 8
        assert await server.hold(20, "two") == 4
        assert await server.hold(20, "three") == 2
        assert await server.one("four")
        assert await server.one()  # who has no name is not counted
        server.calls[0].cancel()
        server.calls[1].cancel()
        await again(lambda: server.one("four"))


async def test_calls_that_had_to_wait_to_be_taken_up_are_answered_too() -> None:
    """Where more than 1000 wait gRPC cancels some, unless it is told otherwise."""
    async with AsyncExitStack() as stack:
        config = ServerConfig(max_concurrent_rpcs=64, drain_s=0)
        running = await stack.enter_async_context(serving(config, unary=echo))
        calls = []
        for _ in range(8):
            channel = sdk_aio_channel(running.address, insecure=True, options=NO_RETRIES)
            await stack.enter_async_context(channel)
            calls += [method(channel, "Unary")(b"", timeout=30) for _ in range(250)]
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 - nobody takes them up meanwhile
        ends = Counter([await call.code() for call in calls])
    assert set(ends) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert ends.total() == 2000
