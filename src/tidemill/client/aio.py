"""The client on grpc.aio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack, cast
from uuid import uuid4

import grpc

from tidemill.api.router.v1.router_service_pb2 import GenerateRequest, GenerateResponse
from tidemill.billing import PriceBook
from tidemill.billing.ledger import Limits
from tidemill.client import account_calls, calls
from tidemill.client.account import (
    Account,
    Balance,
    JournalEntry,
    Operation,
    Quote,
    SettledReceipt,
    SigningKey,
    UsageRow,
)
from tidemill.client.account_calls import UsageBy
from tidemill.client.calls import Call, Stubs
from tidemill.client.exchange import Exchange
from tidemill.client.generation import Generation, Progress
from tidemill.client.margin import MarginBy, MarginReport, get_margin
from tidemill.client.request import Conversation, Options, Prepared, prepare_quote
from tidemill.client.retry import RetryPolicy
from tidemill.client.session import Session
from tidemill.client.settings import CHANNEL_OPTIONS, resolve
from tidemill.client.types import Completion, Event, Key, Model, NewKey, Receipt
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

    async def balance(self) -> Balance:
        """The account's balances, and what the limits of the tenant and the key leave."""
        return await self._run(account_calls.get_balance())

    async def usage(
        self,
        from_ms: int,
        to_ms: int,
        *,
        by: Sequence[UsageBy | str] = (),
        key_id: str | None = None,
        model: str | None = None,
        zone: str | None = None,
    ) -> list[UsageRow]:
        """Receipts decided from `from_ms` to before `to_ms`, added up.

        Rows are told apart by "key", "model", "day" (of the IANA `zone`, UTC unless given) and
        "window". All of them are of one moment, so they sum up to the receipts of that moment.
        """
        ask = partial(
            account_calls.list_usage, from_ms, to_ms, by=by, key_id=key_id, model=model, zone=zone
        )
        rows, token = await self._run(ask(page_token=""))
        while token:
            page, token = await self._run(ask(page_token=token))
            rows += page
        return rows

    async def receipts(
        self, from_ms: int, to_ms: int, *, key_id: str | None = None, model: str | None = None
    ) -> AsyncIterator[Receipt]:
        """Receipts decided from `from_ms` to before `to_ms`, in order, fetched page by page."""
        ask = partial(account_calls.list_receipts, from_ms, to_ms, key_id=key_id, model=model)
        page, token = await self._run(ask(page_token=""))
        for each in page:
            yield each
        while token:
            page, token = await self._run(ask(page_token=token))
            for each in page:
                yield each

    async def receipt(self, request_id: str) -> SettledReceipt:
        """A request's receipt and its refunds; NotFound if nothing was settled under the id."""
        return await self._run(account_calls.get_receipt(request_id))

    async def quote(
        self,
        prompt: str | None = None,
        *,
        model: str,
        token_ids: Sequence[int] | None = None,
        messages: Conversation | None = None,
        expected_completion_tokens: int | None = None,
        **options: Unpack[Options],
    ) -> Quote:
        """What `generate`, or `chat` with `messages`, would cost now and when it is cheaper.

        Nothing is run, held or queued. Unless `expected_completion_tokens` are given the whole of
        max_tokens is expected.
        """
        prepared = prepare_quote(model, prompt, token_ids, messages, options)
        return await self._run(account_calls.quote(prepared, expected_completion_tokens))

    async def price_book(self, digest: str | None = None) -> PriceBook:
        """The price book of a digest (hexadecimal) as receipts name it; None: that in force."""
        return await self._run(account_calls.get_price_book(digest))

    async def signing_keys(self) -> list[SigningKey]:
        """Public keys that receipts are and were signed with, the present one first."""
        return await self._run(account_calls.list_signing_keys())

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

    async def top_up(
        self, tenant_id: str, amount_nano: int, *, operation_id: str | None = None, note: str = ""
    ) -> Operation:
        """Add money that the tenant has paid.

        An `operation_id` makes it safe to repeat, by hand too; without one it gets a new one.
        """
        operation = operation_id or str(uuid4())
        return await self._client._run(
            account_calls.top_up(tenant_id, operation, amount_nano, note)
        )

    async def grant(
        self, tenant_id: str, amount_nano: int, *, operation_id: str | None = None, note: str = ""
    ) -> Operation:
        """Add money that is given; it is spent first. `operation_id` is as for top_up."""
        operation = operation_id or str(uuid4())
        return await self._client._run(account_calls.grant(tenant_id, operation, amount_nano, note))

    async def refund(
        self,
        tenant_id: str,
        request_id: str,
        *,
        amount_nano: int | None = None,
        operation_id: str | None = None,
        note: str = "",
    ) -> Operation:
        """Give back part of a settled charge, or all that is left of it."""
        operation = operation_id or str(uuid4())
        return await self._client._run(
            account_calls.refund(tenant_id, operation, request_id, amount_nano, note)
        )

    async def set_limits(
        self,
        tenant_id: str,
        limits: Limits,
        *,
        key_id: str | None = None,
        operation_id: str | None = None,
    ) -> bool:
        """Replace all limits of the tenant, or of one key; False for a repetition."""
        operation = operation_id or str(uuid4())
        return await self._client._run(
            account_calls.set_limits(tenant_id, operation, limits, key_id)
        )

    async def account(self, tenant_id: str) -> Account:
        """A tenant's balances, limits and live holds."""
        return await self._client._run(account_calls.get_account(tenant_id))

    async def journal(self, tenant_id: str) -> AsyncIterator[JournalEntry]:
        """Every posting of the account since it was made, in order, fetched page by page."""
        page, token = await self._client._run(account_calls.list_journal(tenant_id, ""))
        for each in page:
            yield each
        while token:
            page, token = await self._client._run(account_calls.list_journal(tenant_id, token))
            for each in page:
                yield each

    async def margin(
        self,
        from_ms: int,
        to_ms: int,
        *,
        by: Sequence[MarginBy | str] = (),
        currency: str = "USD",
        accelerator_hour_nano: int | None = None,
    ) -> MarginReport:
        """Cost, revenue and margin of the full hours (UTC) in [from_ms, to_ms), told apart `by`.

        Of the accounts in `currency`. Without a price of an accelerator-hour it is the router's.
        """
        return await self._client._run(
            get_margin(
                from_ms,
                to_ms,
                by=by,
                currency=currency,
                accelerator_hour_nano=accelerator_hour_nano,
            )
        )
