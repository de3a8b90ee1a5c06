"""The client on grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

import grpc

from tidemill.api.router.v1.router_service_pb2 import GenerateRequest, GenerateResponse
from tidemill.client import calls
from tidemill.client.calls import Call, Stubs
from tidemill.client.exchange import Exchange
from tidemill.client.generation import Generation, Progress
from tidemill.client.request import Prepared
from tidemill.client.retry import RetryPolicy
from tidemill.client.session import Session
from tidemill.client.settings import CHANNEL_OPTIONS, resolve
from tidemill.client.types import Completion, Event, Key, Model, NewKey
from tidemill.errors import TidemillError
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.status import from_rpc_error

T = TypeVar("T")
GenerateCall = grpc.aio.UnaryStreamCall[GenerateRequest, GenerateResponse]


class AsyncClient(Generation[Awaitable[Completion], Awaitable["AsyncStream"]]):
    """As Client, for asyncio: every method is awaited, one event loop uses it."""

    def __init__(
        self,
        address: str | None = None,
        api_key: str | None = None,
        ca: Path | str | bytes | None = None,
        *,
        insecure: bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self._session = Session(resolve(address, api_key, ca, insecure), retry or RetryPolicy())
        self._opened: tuple[grpc.aio.Channel, Stubs] | None = None
        self.admin = AsyncAdmin(self)

    async def models(self) -> list[Model]:
        """The models served, by name, with their limits and present prices."""
        return await self._run(calls.list_models())

    async def cancel(self, request_id: str) -> bool:
        """End a running request of the key's tenant; whether it was found running."""
        return await self._run(calls.cancel(request_id))

    async def close(self) -> None:
        """Close the connection; what still runs is given up."""
        if self._opened is not None:
            await self._opened[0].close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def _stubs(self) -> Stubs:
        """Made at the first call: a grpc.aio channel belongs to the loop it is made in."""
        if self._opened is None:
            settings = self._session.settings
            channel = sdk_aio_channel(
                settings.address,
                ca=settings.ca,
                insecure=settings.insecure,
                options=CHANNEL_OPTIONS,
            )
            self._opened = channel, Stubs(channel)
        return self._opened[1]

    async def _stream(self, prepared: Prepared) -> AsyncStream:
        """Try until the first message: only until then may a request be sent again."""
        exchange = self._session.exchange(prepared)
        while True:
            call = self._generate(exchange)
            try:
                message = await call.read()
                if message is grpc.aio.EOF:
                    exchange.end()
                first = exchange.receive(cast(GenerateResponse, message))
            except grpc.RpcError as error:
                failure = exchange.identified(from_rpc_error(error))
                await asyncio.sleep(exchange.attempts.delay_s(failure))
            except BaseException:
                call.cancel()
                raise
            else:
                return AsyncStream(self, exchange, call, first)

    async def _complete(self, prepared: Prepared) -> Completion:
        async with await self._stream(prepared) as stream:
            return await stream.completion()

    def _generate(self, exchange: Exchange) -> GenerateCall:
        call = self._stubs.router.Generate(
            exchange.message,
            timeout=exchange.attempts.remaining_s(),
            metadata=self._session.settings.metadata,
        )
        return cast(GenerateCall, call)  # the generated stub's type is the sync stack's

    async def _run(self, call: Call[T]) -> T:
        attempts = self._session.attempts(call)
        method = call.method(self._stubs)
        while True:
            try:
                answer = await method(
                    call.request,
                    timeout=attempts.remaining_s(),
                    metadata=self._session.settings.metadata,
                )
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.delay_s(from_rpc_error(error)))
            else:
                return call.result(answer)


class AsyncStream(Progress):
    """As Stream, for asyncio. Cancelling the task that reads gives the request up."""

    def __init__(
        self,
        client: AsyncClient,
        exchange: Exchange,
        call: GenerateCall,
        first: Event | None,
    ) -> None:
        super().__init__(exchange)
        self._client = client
        self._call = call
        self._first = first

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                raise self._exchange.identified(from_rpc_error(error)) from error
            if message is grpc.aio.EOF:
                self._exchange.end()
                raise StopAsyncIteration
            try:
                event = self._exchange.receive(cast(GenerateResponse, message))
            except TidemillError:
                await self.close()
                raise
            if event is not None:
                return event

    async def completion(self) -> Completion:
        """Read to the end; the whole answer with its bill."""
        if self.completed is None:
            async for _ in self:
                pass
        return self._exchange.completion()

    async def cancel(self) -> bool:
        """Have the router end the request: what still comes ends with Completed and its bill.

        Whether the router found the request running.
        """
        return await self._client.cancel(self.request_id)

    async def close(self) -> None:
        """Give the request up. It ends, and is billed for what was generated until then."""
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncAdmin:
    """As Admin, for asyncio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def create_tenant(self, tenant_id: str, *, currency: str = "USD") -> bool:
        """Make a tenant whose account is in `currency`; False if it existed just so already."""
        return await self._client._run(calls.create_tenant(tenant_id, currency))

    async def create_key(self, tenant_id: str, *, label: str = "") -> NewKey:
        """Make a key that speaks for the tenant. Its secret is never shown again."""
        return await self._client._run(calls.create_key(tenant_id, label))

    async def revoke_key(self, key_id: str) -> bool:
        """Revoke a key, everywhere within five seconds; whether it was in force until now."""
        return await self._client._run(calls.revoke_key(key_id))

    async def list_keys(self, tenant_id: str | None = None) -> list[Key]:
        """All keys, or one tenant's, in order of key_id."""
        keys, token = await self._client._run(calls.list_keys(tenant_id, ""))
        while token:
            page, token = await self._client._run(calls.list_keys(tenant_id, token))
            keys += page
        return keys
