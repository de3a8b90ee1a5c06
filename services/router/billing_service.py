"""BillingService: what the caller's tenant has, has used and would pay."""

import json
from collections.abc import Callable
from typing import Any
from zoneinfo import ZoneInfo

from services.router.authentication import current_caller, current_tenant
from services.router.billing_messages import (
    balance_message,
    limit_messages,
    quote_message,
    refund_message,
    usage_row,
)
from services.router.messages import ask_of, receipt_message
from services.router.money.accounts import Accounts
from services.router.money.signing import Signer
from services.router.paging import page_state, page_token
from services.router.quoting import Quoting
from services.router.statements import Snapshot, Span, Statements
from services.router.usage_report import Dimension
from tidemill.api.billing.v1 import billing_service_pb2 as pb
from tidemill.api.billing.v1 import billing_service_pb2_grpc
from tidemill.billing import PriceBook
from tidemill.errors import InvalidRequest, NotFound
from tidemill.rpc.validation import validate

_PAGE_SIZE = 100


class BillingService(billing_service_pb2_grpc.BillingServiceServicer):
    """Translates between protos and the tenant's account."""

    def __init__(
        self,
        *,
        accounts: Accounts,
        statements: Statements,
        quoting: Quoting,
        book: PriceBook,
        signer: Signer,
        now_ms: Callable[[], int],
    ) -> None:
        self._accounts = accounts
        self._statements = statements
        self._quoting = quoting
        self._book = book
        self._signer = signer
        self._now_ms = now_ms

    async def GetBalance(
        self, request: pb.GetBalanceRequest, context: Any
    ) -> pb.GetBalanceResponse:
        """The balances, and what the tenant's limits and the key's leave."""
        caller = current_caller()
        balance = await self._accounts.balance(caller.tenant.id)
        limits = await self._accounts.limits(caller.tenant.id)
        return pb.GetBalanceResponse(
            balance=balance_message(balance, caller.tenant.currency),
            limits=limit_messages(limits, caller.key_id, self._now_ms()),
        )

    async def ListUsage(self, request: pb.ListUsageRequest, context: Any) -> pb.ListUsageResponse:
        """One page of rows; every page adds up the same receipts anew."""
        validate(request)
        tenant, span, zone = current_tenant(), _span(request), _zone(request)
        state = page_state(request, position=int, at_ms=int, row=int)
        if state is None:
            snapshot, first = await self._statements.snapshot(tenant.id), 0
        else:
            first = state.pop("row")
            snapshot = Snapshot(**state)
        by = [Dimension(number) for number in request.by]
        rows = await self._statements.usage(tenant.id, span, snapshot, by=by, zone=zone)
        end = first + _page_size(request)
        return pb.ListUsageResponse(
            rows=[usage_row(by, key, totals, tenant.currency) for key, totals in rows[first:end]],
            next_page_token=(
                page_token(
                    request, {"position": snapshot.position, "at_ms": snapshot.at_ms, "row": end}
                )
                if end < len(rows)
                else ""
            ),
        )

    async def ListReceipts(
        self, request: pb.ListReceiptsRequest, context: Any
    ) -> pb.ListReceiptsResponse:
        """One page of receipts."""
        validate(request)
        tenant, span = current_tenant(), _span(request)
        state = page_state(request, position=int, after_ms=int, after_id=str)
        if state is None:
            snapshot, after = await self._statements.snapshot(tenant.id), None
        else:
            snapshot = Snapshot(position=state["position"], at_ms=0)
            after = (state["after_ms"], state["after_id"])
        receipts, after = await self._statements.receipts(
            tenant.id, span, snapshot, after=after, limit=_page_size(request)
        )
        token = ""
        if after is not None:
            after_ms, after_id = after
            token = page_token(
                request,
                {"position": snapshot.position, "after_ms": after_ms, "after_id": after_id},
            )
        return pb.ListReceiptsResponse(
            receipts=map(receipt_message, receipts), next_page_token=token
        )

    async def GetReceipt(
        self, request: pb.GetReceiptRequest, context: Any
    ) -> pb.GetReceiptResponse:
        """One receipt and its refunds."""
        validate(request)
        completed, refunds = await self._statements.receipt(current_tenant().id, request.request_id)
        return pb.GetReceiptResponse(
            receipt=receipt_message(completed), refunds=map(refund_message, refunds)
        )

    async def Quote(self, request: pb.QuoteRequest, context: Any) -> pb.QuoteResponse:
        """Price a request without running it."""
        validate(request)
        quote = await self._quoting.quote(
            ask_of(request.request),
            current_caller(),
            expected_completion_tokens=(
                request.expected_completion_tokens
                if request.HasField("expected_completion_tokens")
                else None
            ),
        )
        return quote_message(quote, self._book.digest)

    async def GetPriceBook(
        self, request: pb.GetPriceBookRequest, context: Any
    ) -> pb.GetPriceBookResponse:
        """A price book by its digest, or the one in force."""
        validate(request)
        digest = request.digest.hex() or self._book.digest
        content = (
            self._book.canonical_bytes
            if digest == self._book.digest
            else await self._accounts.get_book(digest)
        )
        if content is None:
            raise NotFound(f"there is no price book {digest}", reason="PRICE_BOOK_NOT_FOUND")
        book = json.loads(content)
        return pb.GetPriceBookResponse(
            book_id=book["id"],
            version=book["version"],
            digest=bytes.fromhex(digest),
            canonical_json=content,
        )

    async def ListSigningKeys(
        self, request: pb.ListSigningKeysRequest, context: Any
    ) -> pb.ListSigningKeysResponse:
        """The public keys that receipts are and were signed with."""
        return pb.ListSigningKeysResponse(
            keys=[
                pb.SigningKey(signing_key_id=key_id, public_key=public_key)
                for key_id, public_key in self._signer.public_keys.items()
            ]
        )


def _span(request: pb.ListUsageRequest | pb.ListReceiptsRequest) -> Span:
    if request.to_ms < request.from_ms:
        raise InvalidRequest(
            "the span ends before it begins", violations=[("to_ms", "must not be below from_ms")]
        )
    return Span(
        from_ms=request.from_ms,
        to_ms=request.to_ms,
        key_id=request.key_id if request.HasField("key_id") else None,
        model=request.model if request.HasField("model") else None,
    )


def _zone(request: pb.ListUsageRequest) -> ZoneInfo:
    name = request.zone if request.HasField("zone") else "UTC"
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):
        raise InvalidRequest(
            f"there is no time zone {name!r}", violations=[("zone", "must be an IANA name")]
        ) from None


def _page_size(request: pb.ListUsageRequest | pb.ListReceiptsRequest) -> int:
    return request.page_size if request.HasField("page_size") else _PAGE_SIZE
