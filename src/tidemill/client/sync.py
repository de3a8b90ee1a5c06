"""The client on gRPC's synchronous stack, which works under threads and gevent alike."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeVar

import grpc

from tidemill.api.router.v1.router_service_pb2 import GenerateResponse
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
    TIDEMILL_API_KEY and TIDEMILL_CA. Without a CA a loopback address is called in plaintext and
    any other by TLS with the system's authorities; `insecure` overrides that, never beyond
    loopback.

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
    """Tenants and keys; the client's API key must be the operator's."""

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
