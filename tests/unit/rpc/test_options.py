"""The option sets, by what they do. Times are scaled down so that a test takes a second."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.unit.rpc.serving import add_methods, echo, method
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.options import METADATA_BYTES, PUBLIC_SERVER, SDK_CLIENT, Options
from tidemill.rpc.server import RpcServer, ServerConfig

Context = grpc.aio.ServicerContext[bytes, bytes]

LONG_SILENCE = b"5"  # gRPC sends at most one ping a second and takes offence at the third


def with_changes(options: Options, **changes: int) -> Options:
    """`options` with other values; dots in names are written as double underscores."""
    wanted = {f"grpc.{name.replace('__', '.')}": value for name, value in changes.items()}
    assert set(wanted) <= {name for name, _ in options}
    return tuple((name, wanted.get(name, value)) for name, value in options)


async def think(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """One message, as many seconds of silence as the request says, another message."""
    yield b"first"
    await asyncio.sleep(float(request))
    yield b"second"


async def started(options: Options) -> RpcServer:
    server = RpcServer(
        ServerConfig(drain_s=0), public=True, readiness=lambda: None, options=options
    )
    add_methods(server, unary=echo, stream=think)
    await server.start()
    return server


FAST_PINGS = with_changes(SDK_CLIENT, keepalive_time_ms=100)


async def messages(channel: grpc.aio.Channel, silence: bytes) -> list[bytes]:
    return [message async for message in method(channel, "Stream")(silence, timeout=30)]


async def outcome_of_silence(server_options: Options) -> list[bytes] | str:
    """What a client that pings as often as it can gets from a server that thinks."""
    server = await started(server_options)
    try:
        async with sdk_aio_channel(server.address, insecure=True, options=FAST_PINGS) as channel:
            return await messages(channel, LONG_SILENCE)
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    finally:
        await server.drain()


async def test_pings_through_a_silence_are_welcome_up_to_the_rate_allowed() -> None:
    rate = "http2__min_ping_interval_without_data_ms"
    welcome, storm = await asyncio.gather(
        outcome_of_silence(with_changes(PUBLIC_SERVER, **{rate: 500})),
        outcome_of_silence(PUBLIC_SERVER),
    )
    assert welcome == [b"first", b"second"]
    assert storm == "Too many pings"


async def test_connections_are_rotated_without_cutting_a_stream() -> None:
    server = await started(with_changes(PUBLIC_SERVER, max_connection_age_ms=200))
    peers = set()

    async def note_peer(requests: AsyncIterator[bytes], context: Context) -> bytes:
        peers.add(context.peer())
        return b""

    add_methods(server, collect=note_peer)
    try:
        async with sdk_aio_channel(server.address, insecure=True) as channel:
            stream = asyncio.create_task(messages(channel, b"1.5"))
            for _ in range(4):
                await method(channel, "Collect")(iter([b""]), timeout=30)
                await asyncio.sleep(0.3)
            assert await stream == [b"first", b"second"]
    finally:
        await server.drain()
    assert len(peers) > 1


async def test_giant_metadata_is_refused_and_the_server_lives_on() -> None:
    server = await started(PUBLIC_SERVER)
    try:
        async with sdk_aio_channel(server.address, insecure=True) as channel:
            call = method(channel, "Unary")
            small = (("x-filler", "x" * (METADATA_BYTES // 2)),)
            assert await call(b"a", metadata=small, timeout=30) == b"a"
            giant = (("x-filler", "x" * (METADATA_BYTES * 4)),)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"a", metadata=giant, timeout=30)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await call(b"b", timeout=30) == b"b"
    finally:
        await server.drain()
