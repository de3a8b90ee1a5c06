"""A server of one's own for a test: raw-bytes methods behind a real RpcServer on port 0."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from tidemill.rpc.interceptors import Guard
from tidemill.rpc.metrics import RpcMetrics
from tidemill.rpc.server import RpcServer, ServerConfig

SERVICE = "test.v1.TestService"

Unary = Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Awaitable[bytes]]
# An async generator, or a coroutine that writes to its context.
Stream = Callable[[bytes, grpc.aio.ServicerContext[bytes, bytes]], Any]
StreamIn = Callable[[AsyncIterator[bytes], grpc.aio.ServicerContext[bytes, bytes]], Any]


def add_methods(
    server: RpcServer,
    *,
    unary: Unary | None = None,
    stream: Stream | None = None,
    both: StreamIn | None = None,
    collect: StreamIn | None = None,
) -> None:
    """/test.v1.TestService/{Unary,Stream,Both,Collect}, bytes in and bytes out."""
    handlers: dict[str, Any] = {}
    if unary is not None:
        handlers["Unary"] = grpc.unary_unary_rpc_method_handler(unary)
    if stream is not None:
        handlers["Stream"] = grpc.unary_stream_rpc_method_handler(stream)
    if both is not None:
        handlers["Both"] = grpc.stream_stream_rpc_method_handler(both)
    if collect is not None:
        handlers["Collect"] = grpc.stream_unary_rpc_method_handler(collect)
    generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
    server.server.add_generic_rpc_handlers((generic,))


@asynccontextmanager
async def serving(
    config: ServerConfig | None = None,
    *,
    public: bool = True,
    guards: Sequence[Guard] = (),
    metrics: RpcMetrics | None = None,
    readiness: Callable[[], str | None] = lambda: None,
    **methods: Any,
) -> AsyncIterator[RpcServer]:
    """A started server with those methods; drained at the end."""
    server = RpcServer(
        config or ServerConfig(drain_s=0),
        public=public,
        readiness=readiness,
        guards=guards,
        metrics=metrics,
    )
    add_methods(server, **methods)
    await server.start()
    try:
        yield server
    finally:
        await server.drain()


def path(method: str) -> str:
    return f"/{SERVICE}/{method}"


_KINDS = {
    "Unary": "unary_unary",
    "Stream": "unary_stream",
    "Both": "stream_stream",
    "Collect": "stream_unary",
}


def method(channel: Any, name: str) -> Any:
    """The callable for that method on a channel of either stack."""
    return getattr(channel, _KINDS[name])(path(name))


async def echo(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return request
