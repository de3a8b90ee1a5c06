"""`dns:///name:port`: several routers behind one name, called in turn."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest

from tests.name_server import NameServer, name_server
from tests.unit.rpc.serving import add_methods, method
from tidemill.certs import make_dev_certs
from tidemill.rpc.address import is_loopback
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.tls import TlsFiles

Context = grpc.aio.ServicerContext[bytes, bytes]

NAME = "routers.test"
HOSTS = ("127.0.0.2", "127.0.0.3")


class Routers:
    """Servers of one name on one port of several hosts, which tell their host."""

    def __init__(self, certs: Path, port: int, names: NameServer) -> None:
        self.ca = certs / "ca.pem"
        self.names = names
        self._tls = TlsFiles(cert=certs / "router.pem", key=certs / "router.key", ca=self.ca)
        self._port = port
        self._servers: dict[str, RpcServer] = {}

    async def start(self, host: str) -> None:
        """Listen there."""

        async def tell(request: bytes, context: Context) -> bytes:
            return host.encode()

        config = ServerConfig(address=f"{host}:{self._port}", tls=self._tls, drain_s=1.0)
        server = self._servers[host] = RpcServer(config, public=True, readiness=lambda: None)
        add_methods(server, unary=tell)
        await server.start()

    async def drain(self, host: str) -> None:
        """As a process told to stop."""
        await self._servers.pop(host).drain()

    async def close(self) -> None:
        """All of them."""
        for host in list(self._servers):
            await self.drain(host)

    def channel(self) -> grpc.aio.Channel:
        """To all of the name."""
        return sdk_aio_channel(self.names.target(self._port), ca=self.ca)


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("named")
    make_dev_certs(directory, [NAME])
    return directory


@pytest.fixture
async def routers(certs: Path, free_port: Callable[[], int]) -> AsyncIterator[Routers]:
    async with AsyncExitStack() as stack:
        names = await stack.enter_async_context(name_server(NAME, HOSTS))
        made = Routers(certs, free_port(), names)
        stack.push_async_callback(made.close)
        for host in HOSTS:
            await made.start(host)
        yield made


async def ask(channel: grpc.aio.Channel) -> str:
    answer: bytes = await method(channel, "Unary")(b"", timeout=30)
    return answer.decode()


async def ask_twice(channel: grpc.aio.Channel) -> str:
    """A server that shuts down refuses what it has not begun, which then goes to another."""
    try:
        return await ask(channel)
    except grpc.aio.AioRpcError as error:
        if error.code() not in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE):
            raise
        return await ask(channel)


async def until(channel: grpc.aio.Channel, hosts: set[str], within_s: float = 30.0) -> None:
    """Call until just these answer one after the other."""
    async with asyncio.timeout(within_s):
        while {await ask_twice(channel) for _ in range(4)} != hosts:  # noqa: ASYNC110 - gRPC's own pace
            await asyncio.sleep(0.02)


async def test_calls_go_round_all_addresses_of_the_name(routers: Routers) -> None:
    async with routers.channel() as channel:
        await until(channel, set(HOSTS))
        assert Counter([await ask(channel) for _ in range(100)]) == dict.fromkeys(HOSTS, 50)


async def test_no_call_fails_twice_while_one_of_two_drains_and_comes_back(routers: Routers) -> None:
    drained, closing = asyncio.Event(), asyncio.Event()
    seen: Counter[str] = Counter()
    seen_since: Counter[str] = Counter()

    async def keep_asking(channel: grpc.aio.Channel) -> None:
        while not closing.is_set():
            answers = seen_since if drained.is_set() else seen
            answers[await ask_twice(channel)] += 1

    async with routers.channel() as channel, asyncio.timeout(60), asyncio.TaskGroup() as callers:
        await until(channel, set(HOSTS))
        for _ in range(8):
            callers.create_task(keep_asking(channel))
        while seen.total() < 50:  # noqa: ASYNC110 - gRPC's own pace
            await asyncio.sleep(0.02)
        await routers.drain(HOSTS[0])
        drained.set()
        while seen_since.total() < 50:  # noqa: ASYNC110 - gRPC's own pace
            await asyncio.sleep(0.02)
        assert set(seen_since) == {HOSTS[1]}
        await routers.start(HOSTS[0])
        while set(seen_since) != set(HOSTS):  # noqa: ASYNC110 - gRPC's own pace
            await asyncio.sleep(0.02)
        closing.set()


async def test_a_router_that_came_since_is_found_when_another_goes(routers: Routers) -> None:
    async with routers.channel() as channel:
        await until(channel, set(HOSTS))
        routers.names.addresses = [HOSTS[1], "127.0.0.4"]
        await routers.start("127.0.0.4")
        await asyncio.sleep(2.0)  # names are asked at most that often
        await routers.drain(HOSTS[0])
        await until(channel, {HOSTS[1], "127.0.0.4"})


def test_only_localhost_asked_of_our_own_name_server_is_loopback() -> None:
    assert is_loopback("dns:///localhost:1")
    assert is_loopback("dns:///127.0.0.1:1")
    assert not is_loopback("dns:///routers.test:1")
    assert not is_loopback("dns://203.0.113.7/localhost:1")
