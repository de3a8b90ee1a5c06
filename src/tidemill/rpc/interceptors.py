"""What happens around every call of a server: access log, error mapping, authorisation.

One interceptor runs each handler inside a list of guards, asynchronous context managers that see
the call and whatever it raises. The request is read inside them, so nothing of it is looked at
before the caller has been let in. Handlers are coroutines or async generators; they raise the
errors of tidemill.errors and never abort by themselves.
"""

import asyncio
import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
)
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import grpc

from tidemill.errors import Internal, LocalError, PermissionDenied, TidemillError
from tidemill.rpc.malformed import each, only
from tidemill.rpc.metrics import RpcMetrics
from tidemill.rpc.status import abort
from tidemill.rpc.tls import roles_of_peer

REQUEST_ID_KEY = "x-request-id"

_HEALTH = "/grpc.health.v1.Health/"
_MAX_REQUEST_ID = 64
_OK = grpc.StatusCode.OK

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic in the stubs only


@dataclass(frozen=True)
class Call:
    """One call as its guards see it. `method` is `/package.Service/Method`."""

    method: str
    context: Context

    @property
    def is_health(self) -> bool:
        """Whether it asks for grpc.health.v1, which answers every caller."""
        return self.method.startswith(_HEALTH)

    @property
    def request_id(self) -> str | None:
        """The caller's request id from the metadata, if it is one that fits in a log line."""
        for key, value in self.context.invocation_metadata() or ():
            if key == REQUEST_ID_KEY and isinstance(value, str):
                return value if len(value) <= _MAX_REQUEST_ID else None
        return None

    @property
    def peer_roles(self) -> frozenset[str]:
        """Roles that the caller's certificate stands for; empty without one."""
        return roles_of_peer(self.context.auth_context())

    def when_over(self, then: Callable[[], None]) -> None:
        """Have `then` called once gRPC is done with the call, its status sent."""
        self.context.add_done_callback(lambda _: then())  # type: ignore[arg-type]  # wrong stub


Guard = Callable[[Call], AbstractAsyncContextManager[None]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Runs every handler of a server inside `guards`, the first one outermost."""

    def __init__(self, *guards: Guard) -> None:
        self._guards = guards
        self._guarded: dict[str, Handler] = {}  # by method, made at its first call

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """The method's handler inside the guards; None stays None (UNIMPLEMENTED)."""
        method = handler_call_details.method
        guarded = self._guarded.get(method)
        if guarded is None and (handler := await continuation(handler_call_details)) is not None:
            guarded = self._guarded[method] = self._guard(handler, method)
        return guarded

    def _guard(self, handler: Handler, method: str) -> Handler:
        behaviour = getattr(handler, _KINDS[handler.request_streaming, handler.response_streaming])
        parse = handler.request_deserializer

        async def read(requests: AsyncIterator[bytes]) -> Any:
            return (
                each(requests, parse) if handler.request_streaming else await only(requests, parse)
            )

        async def respond(requests: AsyncIterator[bytes], context: Context) -> Any:
            async with self._entered(method, context):
                return await behaviour(await read(requests), context)

        async def stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async with (
                self._entered(method, context),
                aclosing(behaviour(await read(requests), context)) as responses,
            ):
                async for response in responses:
                    yield response

        make_handler: Callable[..., Any] = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        guarded: Handler = make_handler(
            stream if inspect.isasyncgenfunction(behaviour) else respond,
            response_serializer=handler.response_serializer,
        )
        return guarded

    def _entered(self, method: str, context: Context) -> "_Entered":
        return _Entered(self._guards, Call(method, context))


class _Entered(AsyncExitStack):
    """All guards of one call, entered in order."""

    def __init__(self, guards: tuple[Guard, ...], call: Call) -> None:
        super().__init__()
        self._to_enter = [guard(call) for guard in guards]

    async def __aenter__(self) -> "_Entered":
        await super().__aenter__()
        try:
            for guard in self._to_enter:
                await self.enter_async_context(guard)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self


_KINDS: Mapping[tuple[bool, bool], str] = {
    (False, False): "unary_unary",
    (False, True): "unary_stream",
    (True, False): "stream_unary",
    (True, True): "stream_stream",
}


class _Around:
    """A guard that only looks at how the call went."""

    def __init__(self, call: Call) -> None:
        self.call = call

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None


class map_errors(_Around):  # noqa: N801 - a guard is used as a function
    """Guard: what a handler raises becomes a status that a caller can act on.

    A TidemillError travels with its details. Anything else that is not gRPC's own, and every
    LocalError, becomes INTERNAL with an id, under which the log has the traceback. Cancellation
    passes untouched.
    """

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Abort the call by what `error` is."""
        if not isinstance(error, Exception) or isinstance(error, grpc.aio.AbortError):
            return
        if self.call.context.done() or self.call.context.cancelled():
            return  # nobody is there to be told: a write to a vanished caller ends up here
        if isinstance(error, TidemillError) and not isinstance(error, LocalError):
            if error.request_id is None:
                error.request_id = self.call.request_id
            await abort(self.call.context, error)
        error_id = uuid.uuid4().hex
        logger.error(
            "unexpected error",
            exc_info=error,
            extra={
                "error_id": error_id,
                "method": self.call.method,
                "request_id": self.call.request_id,
            },
        )
        surprise = Internal(
            f"internal error {error_id}", error_id=error_id, request_id=self.call.request_id
        )
        await abort(self.call.context, surprise)


class RoleGuard:
    """Guard: each method is open to the roles in `allowed`, all others to nobody.

    Keys are full method names (`/tidemill.api.cache.v1.CacheService/LookupBlocks`). Health is
    exempt. Raises PermissionDenied.
    """

    def __init__(self, allowed: Mapping[str, set[str] | frozenset[str]]) -> None:
        self._allowed = {method: frozenset(roles) for method, roles in allowed.items()}

    def __call__(self, call: Call) -> AbstractAsyncContextManager[None]:
        """Check before the handler runs."""
        return _RoleCheck(call, self._allowed.get(call.method, frozenset()))


class _RoleCheck(_Around):
    def __init__(self, call: Call, allowed: frozenset[str]) -> None:
        super().__init__(call)
        self._allowed = allowed

    async def __aenter__(self) -> None:
        if self.call.is_health or self.call.peer_roles & self._allowed:
            return
        roles = ", ".join(sorted(self.call.peer_roles)) or "no role"
        raise PermissionDenied(
            f"{self.call.method} is not open to {roles}", reason="ROLE_NOT_ALLOWED"
        )


class AccessLog:
    """Guard: one log line, and one observation in `metrics`, per call. Goes outermost."""

    def __init__(self, metrics: RpcMetrics | None = None) -> None:
        self._metrics = metrics

    def __call__(self, call: Call) -> AbstractAsyncContextManager[None]:
        """Watch the call from its arrival to its end."""
        return _Access(call, self._metrics)


class _Access(_Around):
    def __init__(self, call: Call, metrics: RpcMetrics | None) -> None:
        super().__init__(call)
        self._metrics = metrics
        self._started = 0.0

    async def __aenter__(self) -> None:
        self._started = time.monotonic()
        if self._metrics is not None:
            self._metrics.started(self.call.method)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds = time.monotonic() - self._started
        code = _outcome(self.call.context, error)
        if self._metrics is not None:
            self._metrics.finished(self.call.method, code.name, seconds)
        logger.log(
            logging.DEBUG if self.call.is_health else logging.INFO,
            "rpc",
            extra={
                "method": self.call.method,
                "code": code.name,
                "seconds": round(seconds, 6),
                "request_id": self.call.request_id,
            },
        )


def _outcome(context: Context, error: BaseException | None) -> grpc.StatusCode:
    """The code that the caller sees, as far as the server can know it."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit) or context.cancelled():
        return grpc.StatusCode.CANCELLED
    if error is None or isinstance(error, grpc.aio.AbortError):
        code: object = context.code()  # the number, whatever the stubs say; 0 is OK
        return next((each for each in grpc.StatusCode if code in (each, each.value[0])), _OK)
    return grpc.StatusCode.UNKNOWN
