import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from tests.unit.rpc.serving import SERVICE, echo, method, path, serving
from tidemill import errors
from tidemill.rpc.channel import internal_channel, sdk_aio_channel
from tidemill.rpc.interceptors import REQUEST_ID_KEY, RoleGuard
from tidemill.rpc.metrics import RpcMetrics
from tidemill.rpc.probe import probe
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles

Context = grpc.aio.ServicerContext[bytes, bytes]


async def fail_unary(request: bytes, context: Context) -> bytes:
    raise ZeroDivisionError("a secret detail")


async def fail_after_one(request: bytes, context: Context) -> AsyncIterator[bytes]:
    yield b"first"
    raise errors.WorkerLost("decode worker d1 vanished")


async def fail_after_one_write(request: bytes, context: Context) -> None:
    await context.write(b"first")
    raise errors.WorkerLost("decode worker d1 vanished")


async def fail_both(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request
        raise errors.DecodeFull("no room")


async def fail_collect(requests: AsyncIterator[bytes], context: Context) -> bytes:
    async for _ in requests:
        raise errors.CacheUnavailable("no redis")
    return b""


async def call_unary(address: str, **options: Any) -> bytes:
    async with sdk_aio_channel(address, insecure=True) as channel:
        answer: bytes = await method(channel, "Unary")(b"hello", timeout=30, **options)
        return answer


async def test_a_surprise_becomes_internal_with_an_id_that_the_log_explains(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(unary=fail_unary) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_unary(server.address, metadata=((REQUEST_ID_KEY, "r-7"),))
    error = from_rpc_error(caught.value)
    assert isinstance(error, errors.Internal)
    assert error.request_id == "r-7"
    assert "secret" not in error.message
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.__dict__["error_id"] == error.error_id
    assert record.__dict__["request_id"] == "r-7"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def test_a_local_error_tells_the_caller_nothing_but_an_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run_out(request: bytes, context: Context) -> bytes:
        raise errors.PoolExhausted("3 of 7 blocks free")

    async with serving(unary=run_out) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_unary(server.address)
    error = from_rpc_error(caught.value)
    assert error.reason == "INTERNAL"
    assert "blocks" not in error.message
    assert "3 of 7 blocks free" in caplog.text


@pytest.mark.parametrize("stream", [fail_after_one, fail_after_one_write])
async def test_an_error_in_mid_stream_follows_what_was_sent(stream: Callable[..., Any]) -> None:
    async with (
        serving(stream=stream) as server,
        sdk_aio_channel(server.address, insecure=True) as channel,
    ):
        call = method(channel, "Stream")(b"", timeout=30)
        assert await call.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert isinstance(from_rpc_error(caught.value), errors.WorkerLost)


async def test_errors_are_mapped_for_streams_of_requests_too() -> None:
    async with (
        serving(both=fail_both, collect=fail_collect) as server,
        sdk_aio_channel(server.address, insecure=True) as channel,
    ):
        both = method(channel, "Both")(timeout=30)
        await both.write(b"one")
        assert await both.read() == b"one"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await both.read()
        assert isinstance(from_rpc_error(caught.value), errors.DecodeFull)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(channel, "Collect")(iter([b"one"]), timeout=30)
        assert isinstance(from_rpc_error(caught.value), errors.CacheUnavailable)


@pytest.mark.parametrize("write_to_context", [False, True])
async def test_a_handler_can_clean_up_when_its_caller_leaves(
    write_to_context: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cleaned = asyncio.Event()

    async def generate(request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                await asyncio.sleep(0.01)
        finally:
            await asyncio.sleep(0)  # cleaning up may wait
            cleaned.set()

    async def write(request: bytes, context: Context) -> None:
        try:
            while True:
                await context.write(b"x")
                await asyncio.sleep(0.01)
        finally:
            cleaned.set()

    async with (
        serving(stream=write if write_to_context else generate) as server,
        sdk_aio_channel(server.address, insecure=True) as channel,
    ):
        call = method(channel, "Stream")(b"")
        assert await call.read() == b"x"
        call.cancel()
        await asyncio.wait_for(cleaned.wait(), 30)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_roles_are_checked_and_all_else_is_denied(
    tls_files: Callable[[str], TlsFiles],
) -> None:
    guard = RoleGuard({path("Unary"): {"prefill"}})
    config = ServerConfig(tls=tls_files("cache"), drain_s=0)
    outcomes = {}
    async with serving(config, public=False, guards=[guard], unary=echo, collect=echo) as server:
        for role in ("prefill", "worker", "decode"):
            tls = tls_files(role)
            async with internal_channel(server.address, role="cache", tls=tls) as channel:
                for name in ("Unary", "Collect"):
                    outcomes[role, name] = await outcome(channel, name)
                assert await probe(channel) == "SERVING"
    denied = "PermissionDenied ROLE_NOT_ALLOWED"
    assert outcomes == {
        ("prefill", "Unary"): "ok",
        ("worker", "Unary"): "ok",
        ("decode", "Unary"): denied,
        ("prefill", "Collect"): denied,
        ("worker", "Collect"): denied,
        ("decode", "Collect"): denied,
    }


async def outcome(channel: grpc.aio.Channel, name: str) -> str:
    try:
        await method(channel, name)(b"" if name == "Unary" else iter([b""]), timeout=30)
    except grpc.aio.AioRpcError as error:
        read = from_rpc_error(error)
        return f"{type(read).__name__} {read.reason}"
    return "ok"


async def test_without_a_certificate_no_role_is_held() -> None:
    async with serving(guards=[RoleGuard({path("Unary"): {"prefill"}})], unary=echo) as server:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_unary(server.address)
    error = from_rpc_error(caught.value)
    assert isinstance(error, errors.PermissionDenied)
    assert error.message == f"/{SERVICE}/Unary is not open to no role"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with (
        serving(unary=echo) as server,
        sdk_aio_channel(server.address, insecure=True) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await method(channel, "Collect")(iter([b""]), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def exhaust(call: AsyncIterator[bytes]) -> None:
    async for _ in call:
        pass


def access_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str | None]]:
    lines = [record.__dict__ for record in caplog.records if record.message == "rpc"]
    return [(line["method"], line["code"], line["request_id"]) for line in lines]


async def test_every_call_leaves_one_line_with_its_code_and_request_id(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(unary=echo, stream=fail_after_one) as server:
        await call_unary(server.address, metadata=((REQUEST_ID_KEY, "r-1"),))
        await call_unary(server.address, metadata=((REQUEST_ID_KEY, "r" * 1000),))
        async with sdk_aio_channel(server.address, insecure=True) as channel:
            await probe(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await exhaust(method(channel, "Stream")(b"", timeout=30))
    assert access_lines(caplog) == [
        (path("Unary"), "OK", "r-1"),
        (path("Unary"), "OK", None),
        (path("Stream"), "UNAVAILABLE", None),
    ]


async def test_calls_are_counted_by_method_and_code() -> None:
    registry = CollectorRegistry()
    async with serving(unary=fail_unary, stream=echo, metrics=RpcMetrics(registry)) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await call_unary(server.address)
    labels = {"method": path("Unary"), "code": "INTERNAL"}
    assert registry.get_sample_value("tidemill_rpc_handled_total", labels) == 1
    del labels["code"]
    assert registry.get_sample_value("tidemill_rpc_in_flight", labels) == 0
    assert registry.get_sample_value("tidemill_rpc_duration_seconds_count", labels) == 1
