"""AdminService: tenants and keys, for whoever holds the admin key."""

from typing import Any

from services.router.keys import ApiKey, KeyStore
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import admin_service_pb2_grpc
from tidemill.billing import PriceBook
from tidemill.errors import InvalidRequest
from tidemill.rpc.validation import validate

_PAGE_SIZE = 100


class AdminService(admin_service_pb2_grpc.AdminServiceServicer):
    """Translates between protos and the key store."""

    def __init__(self, store: KeyStore, book: PriceBook) -> None:
        self._store = store
        self._book = book

    async def CreateTenant(
        self, request: admin_pb2.CreateTenantRequest, context: Any
    ) -> admin_pb2.CreateTenantResponse:
        """Make a tenant whose account is in a currency that the price book knows."""
        validate(request)
        if request.currency not in self._book.currencies:
            sold = ", ".join(self._book.currencies)
            raise InvalidRequest(
                f"nothing is sold in {request.currency} here",
                violations=[("currency", f"must be one of {sold}")],
            )
        created = await self._store.create_tenant(request.tenant_id, request.currency)
        return admin_pb2.CreateTenantResponse(created=created)

    async def CreateKey(
        self, request: admin_pb2.CreateKeyRequest, context: Any
    ) -> admin_pb2.CreateKeyResponse:
        """Make a key and show it this once."""
        validate(request)
        key_id, key = await self._store.create_key(request.tenant_id, request.label)
        return admin_pb2.CreateKeyResponse(key_id=key_id, key=key)

    async def RevokeKey(
        self, request: admin_pb2.RevokeKeyRequest, context: Any
    ) -> admin_pb2.RevokeKeyResponse:
        """Take a key out of force."""
        validate(request)
        return admin_pb2.RevokeKeyResponse(revoked=await self._store.revoke_key(request.key_id))

    async def ListKeys(
        self, request: admin_pb2.ListKeysRequest, context: Any
    ) -> admin_pb2.ListKeysResponse:
        """One page of keys."""
        validate(request)
        keys, after = await self._store.list_keys(
            request.tenant_id if request.HasField("tenant_id") else None,
            after=request.page_token,
            limit=request.page_size if request.HasField("page_size") else _PAGE_SIZE,
        )
        return admin_pb2.ListKeysResponse(keys=map(_key_info, keys), next_page_token=after)


def _key_info(key: ApiKey) -> admin_pb2.KeyInfo:
    return admin_pb2.KeyInfo(
        key_id=key.id,
        tenant_id=key.tenant_id,
        label=key.label,
        created_at_ms=key.created_at_ms,
        revoked=key.revoked,
    )
