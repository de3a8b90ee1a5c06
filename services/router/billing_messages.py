"""Accounts, usage and quotes as protos, for both services that show money."""

from collections.abc import Mapping, Sequence

from services.router.messages import unit_prices
from services.router.quoting import PricedWindow, Quote
from services.router.usage_report import Dimension, Key, Totals
from tidemill.api.billing.v1 import account_pb2
from tidemill.api.billing.v1 import billing_service_pb2 as pb
from tidemill.billing import ledger as rules

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "daily_budget_nano")
_COLUMNS = {
    Dimension.KEY: "key_id",
    Dimension.MODEL: "model",
    Dimension.DAY: "day",
    Dimension.WINDOW: "window",
}


def balance_message(balance: rules.Balance, currency: str) -> account_pb2.Balance:
    """The balances."""
    return account_pb2.Balance(
        currency=currency,
        granted_nano=balance.granted_nano,
        topped_up_nano=balance.topped_up_nano,
        held_nano=balance.held_nano,
    )


def limits_message(limits: rules.Limits) -> account_pb2.Limits:
    """Limits; unset where there is none."""
    return account_pb2.Limits(**{name: getattr(limits, name) for name in _LIMITS})


def limits_of(message: account_pb2.Limits) -> rules.Limits:
    """The limits in a validated message."""
    return rules.Limits(
        **{
            name: getattr(message, name)
            for name in _LIMITS
            if message.HasField(name)  # type: ignore[arg-type]  # one of the names
        }
    )


def limit_messages(
    limits: Mapping[str, tuple[rules.Limits, rules.Use]], key_id: str, now_ms: int
) -> list[pb.LimitState]:
    """What the limits of the tenant, and of this key, leave."""
    scopes = {"tenant": rules.TENANT, "key": rules.key_scope(key_id)}
    return [
        pb.LimitState(
            scope=name,
            limit=state.limit,
            value=state.value,
            remaining=state.remaining,
            resets_at_ms=state.resets_at_ms,
        )
        for name, scope in scopes.items()
        if scope in limits
        for state in rules.limit_states(name, *limits[scope], now_ms)
    ]


def refund_message(refund: rules.Refunded) -> pb.Refund:
    """What was given back."""
    return pb.Refund(
        operation_id=refund.operation_id,
        amount_nano=refund.amount_nano,
        note=refund.note,
        at_ms=refund.at_ms,
    )


def usage_row(by: Sequence[Dimension], key: Key, totals: Totals, currency: str) -> pb.UsageRow:
    """One row of usage."""
    return pb.UsageRow(
        **{_COLUMNS[dimension]: value for dimension, value in zip(by, key, strict=True)},
        requests=totals.requests,
        cache_hit_tokens=totals.cache_hit_tokens,
        cache_miss_tokens=totals.cache_miss_tokens,
        completion_tokens=totals.completion_tokens,
        reasoning_tokens=totals.reasoning_tokens,
        computed_tokens=totals.computed_tokens,
        reused=pb.TierTokens(**totals.reused),
        unbilled_tokens=totals.unbilled_tokens,
        amount_nano=totals.amount_nano,
        refunded_nano=totals.refunded_nano,
        saved_nano=totals.saved_nano,
        currency=currency,
    )


def quote_message(quote: Quote, book_digest: str) -> pb.QuoteResponse:
    """What a request would cost."""
    return pb.QuoteResponse(
        prompt_tokens=quote.prompt_tokens,
        expected_hit_tokens=quote.expected_hit_tokens,
        max_tokens=quote.max_tokens,
        now=_window(quote.now),
        cheaper=None if quote.cheaper is None else _window(quote.cheaper),
        max_nano=quote.max_nano,
        hold_nano=quote.hold_nano,
        currency=quote.currency,
        book_digest=bytes.fromhex(book_digest),
    )


def _window(window: PricedWindow) -> pb.QuotedWindow:
    return pb.QuotedWindow(
        window=window.window,
        starts_at_ms=window.starts_at_ms,
        ends_at_ms=window.ends_at_ms or 0,
        prices=unit_prices(window.prices),
        expected_nano=window.expected_nano,
    )
