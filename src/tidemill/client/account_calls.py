"""The calls about money: request, method and result of each, the same for both stacks."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TypeVar

from google.protobuf.message import Message

from tidemill.api.billing.v1 import billing_service_pb2 as billing_pb
from tidemill.api.billing.v1 import receipt_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb
from tidemill.billing import PriceBook
from tidemill.billing.ledger import Limits
from tidemill.client import account_convert, convert
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
from tidemill.client.calls import Call
from tidemill.client.request import Prepared
from tidemill.client.types import Receipt
from tidemill.errors import InvalidRequest

M = TypeVar("M", bound=Message)

PAGE_SIZE = 500


class UsageBy(StrEnum):
    """By what usage is told apart."""

    KEY = "key"
    MODEL = "model"
    DAY = "day"
    WINDOW = "window"


_DIMENSIONS = {
    UsageBy.KEY: billing_pb.USAGE_DIMENSION_KEY,
    UsageBy.MODEL: billing_pb.USAGE_DIMENSION_MODEL,
    UsageBy.DAY: billing_pb.USAGE_DIMENSION_DAY,
    UsageBy.WINDOW: billing_pb.USAGE_DIMENSION_WINDOW,
}


def get_balance() -> Call[Balance]:
    """The caller's balances and limits."""
    return Call(
        lambda stubs: stubs.billing.GetBalance,
        billing_pb.GetBalanceRequest(),
        account_convert.own_balance,
    )


def list_usage(
    from_ms: int,
    to_ms: int,
    *,
    by: Sequence[UsageBy | str],
    key_id: str | None,
    model: str | None,
    zone: str | None,
    page_token: str,
) -> Call[tuple[list[UsageRow], str]]:
    """One page of usage, and the next page's token ("" at the end)."""
    return Call(
        lambda stubs: stubs.billing.ListUsage,
        _message(
            billing_pb.ListUsageRequest,
            from_ms=from_ms,
            to_ms=to_ms,
            by=map(_dimension, by),
            key_id=key_id,
            model=model,
            zone=zone,
            page_size=PAGE_SIZE,
            page_token=page_token,
        ),
        lambda answer: (
            [account_convert.usage_row(row) for row in answer.rows],
            answer.next_page_token,
        ),
    )


def list_receipts(
    from_ms: int, to_ms: int, *, key_id: str | None, model: str | None, page_token: str
) -> Call[tuple[list[Receipt], str]]:
    """One page of receipts, and the next page's token."""
    return Call(
        lambda stubs: stubs.billing.ListReceipts,
        _message(
            billing_pb.ListReceiptsRequest,
            from_ms=from_ms,
            to_ms=to_ms,
            key_id=key_id,
            model=model,
            page_size=PAGE_SIZE,
            page_token=page_token,
        ),
        lambda answer: (_receipts(answer.receipts), answer.next_page_token),
    )


def get_receipt(request_id: str) -> Call[SettledReceipt]:
    """One receipt and its refunds."""
    return Call(
        lambda stubs: stubs.billing.GetReceipt,
        _message(billing_pb.GetReceiptRequest, request_id=request_id),
        account_convert.settled_receipt,
    )


def quote(prepared: Prepared, expected_completion_tokens: int | None) -> Call[Quote]:
    """What a request would cost."""
    return Call(
        lambda stubs: stubs.billing.Quote,
        _message(
            billing_pb.QuoteRequest,
            request=prepared.message,
            expected_completion_tokens=expected_completion_tokens,
        ),
        account_convert.quote,
    )


def get_price_book(digest: str | None) -> Call[PriceBook]:
    """A price book by its digest in hexadecimal; None: the one in force."""
    return Call(
        lambda stubs: stubs.billing.GetPriceBook,
        _message(billing_pb.GetPriceBookRequest, digest=_digest(digest)),
        account_convert.price_book,
    )


def list_signing_keys() -> Call[list[SigningKey]]:
    """Public keys that receipts are signed with."""
    return Call(
        lambda stubs: stubs.billing.ListSigningKeys,
        billing_pb.ListSigningKeysRequest(),
        account_convert.signing_keys,
    )


def top_up(tenant_id: str, operation_id: str, amount_nano: int, note: str) -> Call[Operation]:
    """Adds money that was paid."""
    return Call(
        lambda stubs: stubs.admin.TopUp,
        _message(
            admin_pb.TopUpRequest,
            tenant_id=tenant_id,
            operation_id=operation_id,
            amount_nano=amount_nano,
            note=note,
        ),
        lambda answer: account_convert.operation(operation_id, amount_nano, answer),
    )


def grant(tenant_id: str, operation_id: str, amount_nano: int, note: str) -> Call[Operation]:
    """Adds money that the operator gives."""
    return Call(
        lambda stubs: stubs.admin.Grant,
        _message(
            admin_pb.GrantRequest,
            tenant_id=tenant_id,
            operation_id=operation_id,
            amount_nano=amount_nano,
            note=note,
        ),
        lambda answer: account_convert.operation(operation_id, amount_nano, answer),
    )


def refund(
    tenant_id: str, operation_id: str, request_id: str, amount_nano: int | None, note: str
) -> Call[Operation]:
    """Gives a charge back, all that is left of it where no amount is given."""
    return Call(
        lambda stubs: stubs.admin.Refund,
        _message(
            admin_pb.RefundRequest,
            tenant_id=tenant_id,
            operation_id=operation_id,
            request_id=request_id,
            amount_nano=amount_nano,
            note=note,
        ),
        lambda answer: account_convert.operation(operation_id, answer.amount_nano, answer),
    )


def set_limits(tenant_id: str, operation_id: str, limits: Limits, key_id: str | None) -> Call[bool]:
    """Replaces limits; whether this call changed them."""
    return Call(
        lambda stubs: stubs.admin.SetLimits,
        _message(
            admin_pb.SetLimitsRequest,
            tenant_id=tenant_id,
            operation_id=operation_id,
            key_id=key_id,
            limits=account_convert.limits_message(limits),
        ),
        lambda answer: bool(answer.applied),
    )


def get_account(tenant_id: str) -> Call[Account]:
    """A tenant's balances and limits."""
    return Call(
        lambda stubs: stubs.admin.GetAccount,
        _message(admin_pb.GetAccountRequest, tenant_id=tenant_id),
        account_convert.account,
    )


def list_journal(tenant_id: str, page_token: str) -> Call[tuple[list[JournalEntry], str]]:
    """One page of a journal, and the next page's token."""
    return Call(
        lambda stubs: stubs.admin.ListJournal,
        _message(
            admin_pb.ListJournalRequest,
            tenant_id=tenant_id,
            page_size=PAGE_SIZE,
            page_token=page_token,
        ),
        lambda answer: (
            [account_convert.journal_entry(entry) for entry in answer.entries],
            answer.next_page_token,
        ),
    )


def _receipts(messages: Sequence[receipt_pb2.Receipt]) -> list[Receipt]:
    return [convert.receipt(message) for message in messages]


def _message(kind: Callable[..., M], **fields: object) -> M:
    """A message of these fields; InvalidRequest where a value cannot even be written down."""
    try:
        return kind(**fields)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(str(error)) from error


def _digest(text: str | None) -> bytes:
    try:
        return bytes.fromhex(text or "")
    except ValueError as error:
        raise InvalidRequest(f"no digest: {error}", violations=[("digest", str(error))]) from error


def _dimension(name: UsageBy | str) -> int:
    try:
        return _DIMENSIONS[UsageBy(name)]
    except ValueError as error:
        raise InvalidRequest(str(error), violations=[("by", str(error))]) from error
