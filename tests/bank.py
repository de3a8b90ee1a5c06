"""One tenant of a running router with its account in the ledger, and its calls about money."""

import itertools
from typing import Any

import grpc
import pytest

from tests.router_harness import ADMIN_KEY, RouterHarness, bearer
from tests.settlements import NOON_MS, Settlements
from tidemill.api.billing.v1 import billing_service_pb2 as pb
from tidemill.api.billing.v1 import receipt_pb2
from tidemill.errors import TidemillError
from tidemill.rpc.status import from_rpc_error


class Bank:
    """One tenant of a running router, its ledger account, and its calls."""

    def __init__(self, router: RouterHarness, settlements: Settlements, key: str) -> None:
        self.router = router
        self.settlements = settlements
        self.tenant_id = settlements.tenant_id
        self.key = key
        self.metadata = bearer(key)
        self.settle = settlements.settle
        self.key_id = key.removeprefix("tm_").partition(".")[0]

    async def call(self, method: str, request: Any) -> Any:
        """A method of BillingService, with the tenant's key."""
        return await getattr(self.router.billing, method)(request, metadata=self.metadata)

    async def refused(self, method: str, request: Any) -> TidemillError:
        """Why such a call is refused."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.call(method, request)
        return from_rpc_error(caught.value)

    async def admin(self, method: str, request: Any) -> Any:
        """A method of AdminService, with the operator's key."""
        return await getattr(self.router.admin, method)(request, metadata=bearer(ADMIN_KEY))

    async def admin_refused(self, method: str, request: Any) -> TidemillError:
        """Why such a call is refused."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.admin(method, request)
        return from_rpc_error(caught.value)

    async def pages(self, method: str, request: Any, *, size: int) -> list[list[Any]]:
        """Every page of ListUsage or ListReceipts."""
        request.page_size = size
        found = []
        while True:
            answer = await self.call(method, request)
            found.append(list(answer.rows if method == "ListUsage" else answer.receipts))
            request.page_token = answer.next_page_token
            if not answer.next_page_token:
                return found

    async def receipts(self, **fields: Any) -> list[receipt_pb2.Receipt]:
        """All of them, or those of a narrower question."""
        request = pb.ListReceiptsRequest(**({"to_ms": NOON_MS + 10**12} | fields))
        return list(itertools.chain(*await self.pages("ListReceipts", request, size=1000)))
