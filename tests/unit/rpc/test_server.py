import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.unit.rpc.serving import SERVICE, echo, method, serving
from tidemill.errors import ConfigError
from tidemill.rpc.channel import internal_channel, sdk_aio_channel
from tidemill.rpc.health import Health
from tidemill.rpc.options import INTERNAL_MESSAGE_BYTES, PUBLIC_MESSAGE_BYTES
from tidemill.rpc.probe import probe
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.tls import TlsFiles

Context = grpc.aio.ServicerContext[bytes, bytes]


def server(address: str, tls: TlsFiles | None = None, *, public: bool = True) -> RpcServer:
    config = ServerConfig(address=address, tls=tls, drain_s=0)
    return RpcServer(config, public=public, readiness=lambda: None)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "router:0"])
async def test_listening_beyond_loopback_needs_tls(address: str) -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        server(address)


async def test_an_internal_port_needs_tls_even_on_loopback() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:0 needs tls"):
        server("127.0.0.1:0", public=False)


async def test_all_interfaces_are_open_with_tls(tls_files: Callable[[str], TlsFiles]) -> None:
    everywhere = server("0.0.0.0:0", tls_files("cache"), public=False)
    await everywhere.start()
    try:
        address = f"127.0.0.1:{everywhere.port}"
        async with internal_channel(address, role="cache", tls=tls_files("decode")) as channel:
            assert await probe(channel) == "SERVING"
    finally:
        await everywhere.drain()


async def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            await server(address).start()
    assert str(caught.value) == f"cannot listen on {address}: Address already in use"


async def test_two_servers_never_share_a_port() -> None:
    async with serving(unary=echo) as first:
        with pytest.raises(ConfigError, match="Address already in use"):
            await server(first.address).start()


async def test_a_missing_key_file_is_named(tls_files: Callable[[str], TlsFiles]) -> None:
    tls = tls_files("cache")
    gone = TlsFiles(cert=tls.cert, key=tls.key.with_name("gone.key"), ca=tls.ca)
    with pytest.raises(ConfigError, match=r"gone\.key: No such file"):
        server("127.0.0.1:0", gone)


@pytest.mark.parametrize("public", [True, False])
async def test_a_message_over_the_limit_is_refused_and_the_server_lives_on(
    public: bool, tls_files: Callable[[str], TlsFiles]
) -> None:
    limit = PUBLIC_MESSAGE_BYTES if public else INTERNAL_MESSAGE_BYTES
    config = ServerConfig(tls=tls_files("cache"), drain_s=0)
    unlimited = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
    async with (
        serving(config, public=public, unary=echo) as running,
        internal_channel(
            running.address, role="cache", tls=tls_files("decode"), options=unlimited
        ) as channel,
    ):
        send = method(channel, "Unary")
        assert len(await send(bytes(limit), timeout=30)) == limit
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await send(bytes(limit + 1), timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await send(b"still here", timeout=30) == b"still here"


async def test_a_plaintext_client_gets_nothing_from_a_tls_port(
    tls_files: Callable[[str], TlsFiles],
) -> None:
    config = ServerConfig(tls=tls_files("router"), drain_s=0)
    async with (
        serving(config, unary=echo) as running,
        sdk_aio_channel(running.address, insecure=True) as plain,
        sdk_aio_channel(running.address, ca=tls_files("router").ca) as secure,
    ):
        assert await probe(plain, timeout_s=30) == "UNAVAILABLE"
        assert await method(secure, "Unary")(b"hello", timeout=30) == b"hello"


async def test_watchers_of_health_leave_places_for_those_with_credentials() -> None:
    config = ServerConfig(max_concurrent_rpcs=80, drain_s=0)
    async with (
        serving(config, unary=echo) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(100)]
        firsts = await asyncio.gather(*(each.read() for each in watches), return_exceptions=True)
        refused = [each for each in firsts if isinstance(each, grpc.aio.AioRpcError)]
        assert len(refused) == 100 - 64
        assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert await method(channel, "Unary")(b"hello", timeout=30) == b"hello"
        for each in watches:
            each.cancel()
        async with asyncio.timeout(30):
            while await probe(channel) != "SERVING":  # noqa: ASYNC110 - as places become free
                await asyncio.sleep(0.01)


async def test_health_follows_readiness() -> None:
    why: list[str | None] = [None]
    async with (
        serving(readiness=lambda: why[0]) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        assert await probe(channel) == "SERVING"
        why[0] = "the pool leaks"
        running.set_readiness_now()
        assert await probe(channel) == "NOT_SERVING"
        why[0] = None
        running.set_readiness_now()
        assert await probe(channel) == "SERVING"


async def test_health_is_asked_again_by_itself() -> None:
    why: list[str | None] = [None]
    async with (
        serving(readiness=lambda: why[0]) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        why[0] = "stuck"
        stub = health_pb2_grpc.HealthStub(channel)
        statuses = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)  # type: ignore[attr-defined]  # not in the stubs
        seen = [(await statuses.read()).status, (await statuses.read()).status]
    response = health_pb2.HealthCheckResponse
    assert seen == [response.SERVING, response.NOT_SERVING]


async def test_a_readiness_check_that_breaks_is_not_ready() -> None:
    def broken() -> str | None:
        raise ZeroDivisionError

    async with (
        serving(readiness=broken) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        assert await probe(channel) == "NOT_SERVING"


async def test_a_watcher_that_does_not_read_freezes_nobodys_health() -> None:
    writing = asyncio.Event()

    class Clogged:
        async def write(self, _: object) -> None:
            writing.set()
            await asyncio.Event().wait()

    health = Health(lambda: why)
    why: str | None = None
    health.start([])
    watch = asyncio.create_task(health.Watch(health_pb2.HealthCheckRequest(), Clogged()))
    await writing.wait()
    why = "broken"
    health.refresh()
    answer = await health.Check(health_pb2.HealthCheckRequest(), None)
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await health.end()
    await asyncio.wait_for(watch, 30)


async def test_each_service_has_its_own_name_in_health() -> None:
    running = server("127.0.0.1:0")
    running.add_service_name(SERVICE)
    await running.start()
    try:
        async with sdk_aio_channel(running.address, insecure=True) as channel:
            assert await probe(channel, service=SERVICE) == "SERVING"
            assert await probe(channel, service="test.v1.Other") == "NOT_FOUND"
    finally:
        await running.drain()


async def test_drain_lets_running_calls_finish_and_ends_health_watches() -> None:
    started = asyncio.Event()

    async def slow(request: bytes, context: Context) -> AsyncIterator[bytes]:
        started.set()
        await asyncio.sleep(0.3)
        yield b"done"

    config = ServerConfig(drain_s=60)
    async with (
        serving(config, stream=slow) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        statuses: Any = stub.Watch(health_pb2.HealthCheckRequest())  # type: ignore[attr-defined]  # not in the stubs
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.SERVING
        call = method(channel, "Stream")(b"")
        await started.wait()
        before = time.monotonic()
        draining = asyncio.create_task(running.drain())
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await call.read() == b"done"
        await draining
        assert time.monotonic() - before < config.drain_s


async def test_drain_ends_calls_that_outlast_it() -> None:
    ended = asyncio.Event()

    async def forever(request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            yield b"one"
            await asyncio.sleep(60)
        finally:
            ended.set()

    async with (
        serving(ServerConfig(drain_s=0.2), stream=forever) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        call = method(channel, "Stream")(b"")
        assert await call.read() == b"one"
        await running.drain()
        await asyncio.wait_for(ended.wait(), 30)


@pytest.mark.parametrize("reflection", [True, False])
async def test_reflection_answers_only_where_it_is_on(reflection: bool) -> None:
    config = ServerConfig(drain_s=0, reflection=reflection)
    async with (
        serving(config, unary=echo) as running,
        sdk_aio_channel(running.address, insecure=True) as channel,
    ):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # the stubs know only the sync stack
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]), timeout=30)
        if reflection:
            listed = (await call.read()).list_services_response.service
            assert "grpc.health.v1.Health" in {service.name for service in listed}
        else:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("settings", [{"max_concurrent_rpcs": 0}, {"drain_s": -1.0}])
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ServerConfig(**settings)
