"""The unary calls: request, method and result of each, the same for both stacks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.protobuf.message import Message as Protobuf

from tidemill.api.billing.v1.billing_service_pb2_grpc import BillingServiceStub
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb
from tidemill.api.router.v1 import router_service_pb2 as router_pb
from tidemill.api.router.v1.admin_service_pb2_grpc import AdminServiceStub
from tidemill.api.router.v1.router_service_pb2_grpc import RouterServiceStub
from tidemill.client import convert
from tidemill.client.types import Key, Model, NewKey

T = TypeVar("T")


class Stubs:
    """The router's services on one channel of either stack."""

    def __init__(self, channel: grpc.Channel | grpc.aio.Channel) -> None:
        self.router = RouterServiceStub(channel)
        self.admin = AdminServiceStub(channel)
        self.billing = BillingServiceStub(channel)


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One unary call. `repeatable`: making it twice does no more than making it once."""

    method: Callable[[Stubs], Callable[..., Any]]
    request: Protobuf
    result: Callable[[Any], T]
    repeatable: bool = True


def list_models() -> Call[list[Model]]:
    """Models served, by name."""
    return Call(
        lambda stubs: stubs.router.ListModels, router_pb.ListModelsRequest(), convert.models
    )


def cancel(request_id: str) -> Call[bool]:
    """Ends a running request; whether it was found."""
    return Call(
        lambda stubs: stubs.router.CancelGeneration,
        router_pb.CancelGenerationRequest(request_id=request_id),
        lambda answer: bool(answer.found),
    )


def create_tenant(tenant_id: str, currency: str) -> Call[bool]:
    """Makes a tenant; whether this call made it."""
    return Call(
        lambda stubs: stubs.admin.CreateTenant,
        admin_pb.CreateTenantRequest(tenant_id=tenant_id, currency=currency),
        lambda answer: bool(answer.created),
    )


def create_key(tenant_id: str, label: str) -> Call[NewKey]:
    """Makes a key. Never repeated: each call makes another."""
    return Call(
        lambda stubs: stubs.admin.CreateKey,
        admin_pb.CreateKeyRequest(tenant_id=tenant_id, label=label),
        lambda answer: NewKey(key_id=answer.key_id, key=answer.key),
        repeatable=False,
    )


def revoke_key(key_id: str) -> Call[bool]:
    """Revokes a key; whether it was in force until now."""
    return Call(
        lambda stubs: stubs.admin.RevokeKey,
        admin_pb.RevokeKeyRequest(key_id=key_id),
        lambda answer: bool(answer.revoked),
    )


def list_keys(tenant_id: str | None, page_token: str) -> Call[tuple[list[Key], str]]:
    """One page of keys, and the next page's token ("" at the end)."""
    return Call(
        lambda stubs: stubs.admin.ListKeys,
        admin_pb.ListKeysRequest(tenant_id=tenant_id, page_token=page_token),
        lambda answer: ([convert.key(key) for key in answer.keys], answer.next_page_token),
    )
