"""What the SDK hands out about money: balances, limits, usage, quotes and the operator's journal.

Amounts are nano-units, 10^-9 of the account's currency; instants milliseconds since the Unix epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tidemill import billing
from tidemill.billing.ledger import Limits
from tidemill.client.types import Receipt


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitState:
    """A limit of `scope` ("tenant" or "key") and what is left of it now.

    `limit` is the name of a field of Limits. `resets_at_ms` is when it is whole again if nothing
    more is used; None: as requests end.
    """

    scope: str
    limit: str
    value: int
    remaining: int
    resets_at_ms: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Balance:
    """What an account holds; what was granted is spent first."""

    currency: str
    granted_nano: int
    topped_up_nano: int
    held_nano: int
    limits: tuple[LimitState, ...] = ()

    @property
    def available_nano(self) -> int:
        """Free to spend."""
        return self.granted_nano + self.topped_up_nano

    @property
    def available(self) -> str:
        """The same for people, e.g. "4.998765500 USD"."""
        return billing.format_amount(self.available_nano, self.currency)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return {**asdict(self), "available_nano": self.available_nano}


@dataclass(frozen=True, kw_only=True, slots=True)
class UsageRow:
    """What some receipts add up to; a dimension that was not asked for is ""."""

    key_id: str = ""
    model: str = ""
    day: str = ""
    window: str = ""
    requests: int
    cache_hit_tokens: int
    cache_miss_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    computed_tokens: int
    reuse: billing.Reuse
    unbilled_tokens: int
    amount_nano: int
    refunded_nano: int
    saved_nano: int
    currency: str

    @property
    def amount(self) -> str:
        """The charges for people."""
        return billing.format_amount(self.amount_nano, self.currency)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refund:
    """Part of a charge that was given back."""

    operation_id: str
    amount_nano: int
    note: str
    at_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SettledReceipt:
    """A receipt, and what was given back of it since."""

    receipt: Receipt
    refunds: tuple[Refund, ...]

    def to_dict(self) -> dict[str, Any]:
        """The receipt's plain values with `refunds`."""
        return {**self.receipt.to_dict(), "refunds": [asdict(refund) for refund in self.refunds]}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuotedWindow:
    """A tariff window and what the request is expected to cost in it.

    Prices are pico-units (10^-12) a token; `ends_at_ms` None: never.
    """

    window: str
    starts_at_ms: int
    ends_at_ms: int | None
    prices: billing.Prices
    expected_nano: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Quote:
    """What a request would cost.

    `expected_hit_tokens` is what the router knows of its workers, and no promise. `cheaper` is the
    next window in which it costs less, if there is one within seven days. It can cost `max_nano`
    at most, and `hold_nano` would be held at first.
    """

    prompt_tokens: int
    expected_hit_tokens: int
    max_tokens: int
    now: QuotedWindow
    cheaper: QuotedWindow | None
    max_nano: int
    hold_nano: int
    currency: str
    book_digest: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class SigningKey:
    """A public key that receipts are signed with: Ed25519 [32 bytes]."""

    signing_key_id: str
    public_key: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """What came of TopUp, Grant or Refund; `applied` is False for a repetition."""

    operation_id: str
    applied: bool
    amount_nano: int
    balance: Balance

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return {**asdict(self), "balance": self.balance.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """A tenant's account as its operator sees it; `holds` counts live requests by state."""

    balance: Balance
    limits: Limits = field(default_factory=Limits)
    key_limits: Mapping[str, Limits] = field(default_factory=dict)
    holds: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them; only limits that are set."""
        return {
            "balance": self.balance.to_dict(),
            "limits": set_limits(self.limits),
            "key_limits": {key_id: set_limits(each) for key_id, each in self.key_limits.items()},
            "holds": dict(self.holds),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalEntry:
    """Money that moved; `postings` (sub-account -> nano-units) add up to nothing."""

    entry_id: str
    kind: str
    subject: str
    at_ms: int
    postings: Mapping[str, int]
    detail: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `tidemill --json` prints them."""
        return asdict(self)


def set_limits(limits: Limits) -> dict[str, int]:
    """Those limits that there are."""
    values = {each.name: getattr(limits, each.name) for each in fields(limits)}
    return {name: value for name, value in values.items() if value is not None}
