from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tidemill.errors import DeadlineExceeded, InvalidRequest, PermissionDenied, TidemillError
from tidemill.rpc import malformed
from tidemill.rpc.interceptors import Call, Guard
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.status import from_rpc_error

NOT_UTF8 = b"\x0a\x02\xff\xfe"
NO_MESSAGE = b"\xff\xff\xff"
GOOD = StringValue(value="good").SerializeToString()


async def _unary(request: StringValue, context: Any) -> bytes:
    return request.value.encode()


async def _join(requests: AsyncIterator[StringValue], context: Any) -> bytes:
    return "".join([request.value async for request in requests]).encode()


@asynccontextmanager
async def _served(*guards: Guard) -> AsyncIterator[grpc.aio.Channel]:
    server = RpcServer(ServerConfig(drain_s=0), public=True, readiness=lambda: None, guards=guards)
    parse = StringValue.FromString
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary, request_deserializer=parse),
        "Join": grpc.stream_unary_rpc_method_handler(_join, request_deserializer=parse),
    }
    generic = grpc.method_handlers_generic_handler("test.v1.TestService", handlers)
    server.server.add_generic_rpc_handlers((generic,))
    await server.start()
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel
    await server.drain()


async def _error(call: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("data", [NOT_UTF8, NO_MESSAGE])
async def test_bytes_that_are_no_message_are_an_invalid_request(data: bytes) -> None:
    async with _served() as channel:
        unary: Any = channel.unary_unary("/test.v1.TestService/Unary")
        error = await _error(unary(data))
        assert isinstance(error, InvalidRequest)
        assert error.reason == "MALFORMED_REQUEST"
        assert await unary(GOOD) == b"good"


async def test_a_stream_of_requests_breaks_at_the_one_that_is_no_message() -> None:
    async with _served() as channel:
        join: Any = channel.stream_unary("/test.v1.TestService/Join")
        assert await join(iter([GOOD, GOOD])) == b"goodgood"
        error = await _error(join(iter([GOOD, NOT_UTF8])))
        assert error.reason == "MALFORMED_REQUEST"


async def test_who_may_not_call_learns_nothing_of_the_request() -> None:
    @asynccontextmanager
    async def refuse(call: Call) -> AsyncIterator[None]:
        if not call.is_health:
            raise PermissionDenied("not you")
        yield

    async with _served(refuse) as channel:
        unary: Any = channel.unary_unary("/test.v1.TestService/Unary")
        error = await _error(unary(NOT_UTF8))
        assert isinstance(error, PermissionDenied)


async def test_of_a_call_that_is_refused_not_one_byte_is_read() -> None:
    """Else whoever has no key could hold all places of the server by sending nothing."""

    @asynccontextmanager
    async def refuse(call: Call) -> AsyncIterator[None]:
        if call.method:
            raise PermissionDenied("not you")
        yield

    async with _served(refuse) as channel:
        silent: Any = channel.stream_unary("/test.v1.TestService/Unary")(timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await silent
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_caller_who_sends_nothing_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(malformed, "REQUEST_S", 0.1)
    async with _served() as channel:
        silent: Any = channel.stream_unary("/test.v1.TestService/Unary")(timeout=30)
        assert isinstance(await _error(silent), DeadlineExceeded)


async def test_a_call_without_a_request_is_malformed() -> None:
    async with _served() as channel:
        empty: Any = channel.stream_unary("/test.v1.TestService/Unary")
        assert (await _error(empty(iter([]), timeout=30))).reason == "MALFORMED_REQUEST"
