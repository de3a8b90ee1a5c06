"""The client on gRPC's synchronous stack, which works under threads and gevent alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar, Unpack
from uuid import uuid4

import grpc

from tidemill.api.router.v1.router_service_pb2 import GenerateResponse
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
from tidemill.rpc.channel import sdk_channel
from tidemill.rpc.status import from_rpc_error

T = TypeVar("T")


class _GenerateCall(Protocol):
    """What a streaming call of gRPC's synchronous stack offers."""

    def __next__(self) -> GenerateResponse: ...
    def cancel(self) -> bool: ...


class Client(Generation[Completion, "Stream"]):
    """Calls a router. Safe to share between threads; close it, or use it as a context manager.

    `address` (host:port), `api_key` and `ca` (PEM file or bytes) default to TIDEMILL_ADDRESS,
    TIDEMILL_API_KEY and TIDEMILL_CA. Of `dns:///host:port` all addresses are called in turn; any
    other address is one connection, hence one router process. Without a CA a loopback address is
    called in plaintext and any other by TLS with the system's authorities; `insecure` overrides
    that, never beyond loopback.

    Every method raises the classes of tidemill.errors, with the request's id where there is one.
    """

    def __init__(
        self,
        address: str | None = None,
        api_key: str | None = None,
        ca: Path | str | bytes | None = None,
        *,
        insecure: bool | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        settings = resolve(address, api_key, ca, insecure)
        self._session = Session(settings, retry or RetryPolicy())
        self._channel = sdk_channel(
            settings.address, ca=settings.ca, insecure=settings.insecure, options=CHANNEL_OPTIONS
        )
        self._stubs = Stubs(self._channel)
        self.admin = Admin(self)

    def models(self) -> list[Model]:
        """The models served, by name, with their limits and present prices."""
        return self._run(calls.list_models())

    def cancel(self, request_id: str) -> bool:
        """End a running request of the key's tenant; whether it was found running."""
        return self._run(calls.cancel(request_id))

    def balance(self) -> Balance:
        """The account's balances, and what the limits of the tenant and the key leave."""
        return self._run(account_calls.get_balance())

    def usage(
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
        rows, token = self._run(ask(page_token=""))
        while token:
            page, token = self._run(ask(page_token=token))
            rows += page
        return rows

    def receipts(
        self, from_ms: int, to_ms: int, *, key_id: str | None = None, model: str | None = None
    ) -> Iterator[Receipt]:
        """Receipts decided from `from_ms` to before `to_ms`, in order, fetched page by page."""
        ask = partial(account_calls.list_receipts, from_ms, to_ms, key_id=key_id, model=model)
        page, token = self._run(ask(page_token=""))
        yield from page
        while token:
            page, token = self._run(ask(page_token=token))
            yield from page

    def receipt(self, request_id: str) -> SettledReceipt:
        """A request's receipt and its refunds; NotFound if nothing was settled under the id."""
        return self._run(account_calls.get_receipt(request_id))

    def quote(
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
        return self._run(account_calls.quote(prepared, expected_completion_tokens))

    def price_book(self, digest: str | None = None) -> PriceBook:
        """The price book of a digest (hexadecimal) as receipts name it; None: that in force."""
        return self._run(account_calls.get_price_book(digest))

    def signing_keys(self) -> list[SigningKey]:
        """Public keys that receipts are and were signed with, the present one first."""
        return self._run(account_calls.list_signing_keys())

    def close(self) -> None:
        """Close the connection; what still runs is given up."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stream(self, prepared: Prepared) -> Stream:
        return Stream(self, self._session.exchange(prepared))

    def _complete(self, prepared: Prepared) -> Completion:
        with self._stream(prepared) as stream:
            return stream.completion()

    def _generate(self, exchange: Exchange) -> _GenerateCall:
        return self._stubs.router.Generate(
            exchange.message,
            timeout=exchange.attempts.remaining_s(),
            metadata=self._session.settings.metadata,
        )

    def _run(self, call: Call[T]) -> T:
        attempts = self._session.attempts(call)
        method = call.method(self._stubs)
        while True:
            try:
                answer = method(
                    call.request,
                    timeout=attempts.remaining_s(),
                    metadata=self._session.settings.metadata,
                )
            except grpc.RpcError as error:
                time.sleep(attempts.delay_s(from_rpc_error(error)))
            else:
                return call.result(answer)


class Stream(Progress):
    """A completion on its way: iterate over its events, of which Completed is the last.

    Leaving the `with` block early, or `close`, gives the request up without seeing its bill;
    `cancel` ends it with one. One thread iterates; any may cancel.
    """

    def __init__(self, client: Client, exchange: Exchange) -> None:
        super().__init__(exchange)
        self._client = client
        self._call, self._first = self._open()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while True:
            try:
                message = next(self._call)
            except StopIteration:
                self._exchange.end()
                raise
            except grpc.RpcError as error:
                raise self._exchange.identified(from_rpc_error(error)) from error
            try:
                event = self._exchange.receive(message)
            except TidemillError:
                self.close()
                raise
            if event is not None:
                return event

    def completion(self) -> Completion:
        """Read to the end; the whole answer with its bill."""
        if self.completed is None:
            for _ in self:
                pass
        return self._exchange.completion()

    def cancel(self) -> bool:
        """Have the router end the request: what still comes ends with Completed and its bill.

        Whether the router found the request running.
        """
        return self._client.cancel(self.request_id)

    def close(self) -> None:
        """Give the request up. It ends, and is billed for what was generated until then."""
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> tuple[_GenerateCall, Event | None]:
        """Try until the first message: only until then may a request be sent again."""
        while True:
            call = self._client._generate(self._exchange)
            try:
                return call, self._exchange.receive(next(call))
            except StopIteration:
                self._exchange.end()
            except grpc.RpcError as error:
                failure = self._exchange.identified(from_rpc_error(error))
                time.sleep(self._exchange.attempts.delay_s(failure))
            except BaseException:
                call.cancel()
                raise


class Admin:
    """Tenants, keys and money; the client's API key must be the operator's."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def create_tenant(self, tenant_id: str, *, currency: str = "USD") -> bool:
        """Make a tenant whose account is in `currency`; False if it existed just so already."""
        return self._client._run(calls.create_tenant(tenant_id, currency))

    def create_key(self, tenant_id: str, *, label: str = "") -> NewKey:
        """Make a key that speaks for the tenant. Its secret is never shown again."""
        return self._client._run(calls.create_key(tenant_id, label))

    def revoke_key(self, key_id: str) -> bool:
        """Revoke a key, everywhere within five seconds; whether it was in force until now."""
        return self._client._run(calls.revoke_key(key_id))

    def list_keys(self, tenant_id: str | None = None) -> list[Key]:
        """All keys, or one tenant's, in order of key_id."""
        keys, token = self._client._run(calls.list_keys(tenant_id, ""))
        while token:
            page, token = self._client._run(calls.list_keys(tenant_id, token))
            keys += page
        return keys

    def top_up(
        self, tenant_id: str, amount_nano: int, *, operation_id: str | None = None, note: str = ""
    ) -> Operation:
        """Add money that the tenant has paid.

        An `operation_id` makes it safe to repeat, by hand too; without one it gets a new one.
        """
        operation = operation_id or str(uuid4())
        return self._client._run(account_calls.top_up(tenant_id, operation, amount_nano, note))

    def grant(
        self, tenant_id: str, amount_nano: int, *, operation_id: str | None = None, note: str = ""
    ) -> Operation:
        """Add money that is given; it is spent first. `operation_id` is as for top_up."""
        operation = operation_id or str(uuid4())
        return self._client._run(account_calls.grant(tenant_id, operation, amount_nano, note))

    def refund(
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
        return self._client._run(
            account_calls.refund(tenant_id, operation, request_id, amount_nano, note)
        )

    def set_limits(
        self,
        tenant_id: str,
        limits: Limits,
        *,
        key_id: str | None = None,
        operation_id: str | None = None,
    ) -> bool:
        """Replace all limits of the tenant, or of one key; False for a repetition."""
        operation = operation_id or str(uuid4())
        return self._client._run(account_calls.set_limits(tenant_id, operation, limits, key_id))

    def account(self, tenant_id: str) -> Account:
        """A tenant's balances, limits and live holds."""
        return self._client._run(account_calls.get_account(tenant_id))

    def journal(self, tenant_id: str) -> Iterator[JournalEntry]:
        """Every posting of the account since it was made, in order, fetched page by page."""
        page, token = self._client._run(account_calls.list_journal(tenant_id, ""))
        yield from page
        while token:
            page, token = self._client._run(account_calls.list_journal(tenant_id, token))
            yield from page

    def margin(
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
        return self._client._run(
            get_margin(
                from_ms,
                to_ms,
                by=by,
                currency=currency,
                accelerator_hour_nano=accelerator_hour_nano,
            )
        )
