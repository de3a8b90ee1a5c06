"""From the billing and admin services' messages to the SDK's types."""

import json

from tidemill.api.billing.v1 import account_pb2, receipt_pb2
from tidemill.api.billing.v1 import billing_service_pb2 as billing_pb
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb
from tidemill.billing import PriceBook, Prices, Reuse, decode_book
from tidemill.billing.ledger import Limits
from tidemill.client import convert
from tidemill.client.account import (
    Account,
    Balance,
    JournalEntry,
    LimitState,
    Operation,
    Quote,
    QuotedWindow,
    Refund,
    SettledReceipt,
    SigningKey,
    UsageRow,
)

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "daily_budget_nano")


def balance(message: account_pb2.Balance, limits: tuple[LimitState, ...] = ()) -> Balance:
    """The balances."""
    return Balance(
        currency=message.currency,
        granted_nano=message.granted_nano,
        topped_up_nano=message.topped_up_nano,
        held_nano=message.held_nano,
        limits=limits,
    )


def own_balance(message: billing_pb.GetBalanceResponse) -> Balance:
    """The caller's balances, and what its limits leave."""
    states = tuple(
        LimitState(
            scope=state.scope,
            limit=state.limit,
            value=state.value,
            remaining=state.remaining,
            resets_at_ms=state.resets_at_ms or None,
        )
        for state in message.limits
    )
    return balance(message.balance, states)


def usage_row(message: billing_pb.UsageRow) -> UsageRow:
    """One row of usage."""
    reused = message.reused
    return UsageRow(
        key_id=message.key_id,
        model=message.model,
        day=message.day,
        window=message.window,
        requests=message.requests,
        cache_hit_tokens=message.cache_hit_tokens,
        cache_miss_tokens=message.cache_miss_tokens,
        completion_tokens=message.completion_tokens,
        reasoning_tokens=message.reasoning_tokens,
        computed_tokens=message.computed_tokens,
        reuse=Reuse(
            device=reused.device,
            host=reused.host,
            cache_ram=reused.cache_ram,
            cache_disk=reused.cache_disk,
            peer=reused.peer,
        ),
        unbilled_tokens=message.unbilled_tokens,
        amount_nano=message.amount_nano,
        refunded_nano=message.refunded_nano,
        saved_nano=message.saved_nano,
        currency=message.currency,
    )


def settled_receipt(message: billing_pb.GetReceiptResponse) -> SettledReceipt:
    """A receipt and its refunds."""
    return SettledReceipt(
        receipt=convert.receipt(message.receipt),
        refunds=tuple(
            Refund(
                operation_id=refund.operation_id,
                amount_nano=refund.amount_nano,
                note=refund.note,
                at_ms=refund.at_ms,
            )
            for refund in message.refunds
        ),
    )


def quote(message: billing_pb.QuoteResponse) -> Quote:
    """What a request would cost."""
    return Quote(
        prompt_tokens=message.prompt_tokens,
        expected_hit_tokens=message.expected_hit_tokens,
        max_tokens=message.max_tokens,
        now=_window(message.now),
        cheaper=_window(message.cheaper) if message.HasField("cheaper") else None,
        max_nano=message.max_nano,
        hold_nano=message.hold_nano,
        currency=message.currency,
        book_digest=message.book_digest.hex(),
    )


def price_book(message: billing_pb.GetPriceBookResponse) -> PriceBook:
    """The book; ConfigError if it is not the one that its digest names."""
    return decode_book(message.canonical_json, digest=message.digest.hex())


def signing_keys(message: billing_pb.ListSigningKeysResponse) -> list[SigningKey]:
    """The keys, the present one first."""
    return [
        SigningKey(signing_key_id=key.signing_key_id, public_key=key.public_key)
        for key in message.keys
    ]


def operation(
    operation_id: str,
    amount_nano: int,
    message: admin_pb.TopUpResponse | admin_pb.GrantResponse | admin_pb.RefundResponse,
) -> Operation:
    """What came of it."""
    return Operation(
        operation_id=operation_id,
        applied=message.applied,
        amount_nano=amount_nano,
        balance=balance(message.balance),
    )


def account(message: admin_pb.GetAccountResponse) -> Account:
    """An account."""
    return Account(
        balance=balance(message.balance),
        limits=limits(message.limits),
        key_limits={key_id: limits(each) for key_id, each in message.key_limits.items()},
        holds=dict(message.holds),
    )


def limits(message: account_pb2.Limits) -> Limits:
    """Those that are set."""
    return Limits(
        **{
            name: getattr(message, name)
            for name in _LIMITS
            if message.HasField(name)  # type: ignore[arg-type]  # one of the names
        }
    )


def limits_message(limits: Limits) -> account_pb2.Limits:
    """The same for the wire."""
    return account_pb2.Limits(**{name: getattr(limits, name) for name in _LIMITS})


def journal_entry(message: admin_pb.JournalEntry) -> JournalEntry:
    """An entry, its detail parsed."""
    return JournalEntry(
        entry_id=message.entry_id,
        kind=message.kind,
        subject=message.subject,
        at_ms=message.at_ms,
        postings=dict(message.postings),
        detail=json.loads(message.detail_json) if message.detail_json else {},
    )


def _window(message: billing_pb.QuotedWindow) -> QuotedWindow:
    return QuotedWindow(
        window=message.window,
        starts_at_ms=message.starts_at_ms,
        ends_at_ms=message.ends_at_ms or None,
        prices=_prices(message.prices),
        expected_nano=message.expected_nano,
    )


def _prices(message: receipt_pb2.UnitPrices) -> Prices:
    return Prices(hit=message.hit_pico, miss=message.miss_pico, output=message.output_pico)
