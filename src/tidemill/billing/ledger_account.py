"""All that is kept of one tenant's money. Amounts and clocks: see `tidemill.billing.ledger`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tidemill.billing.chain import FIRST_CHAIN
from tidemill.billing.ledger_commands import Limits
from tidemill.billing.ledger_replies import Balance, Posted, State

TENANT = "tenant"  # scope of the account's own limits; a key's scope is key_scope(key_id)

GRANTED = "granted"
TOPPED_UP = "topped_up"
HOLD = "hold"
REVENUE = "revenue"
ADJUSTMENT = "adjustment"  # what was granted, negative
PAID_IN = "paid_in"  # what was topped up, negative
SUB_ACCOUNTS = (GRANTED, TOPPED_UP, HOLD, REVENUE, ADJUSTMENT, PAID_IN)


def key_scope(key_id: str) -> str:
    """The scope of an API key's limits."""
    return f"key:{key_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How much of a scope's limits is used.

    Levels of the buckets are in 1/60,000 of a request or token; None: the bucket was never
    used, so it is full. `used_nano` is held and settled of the UTC day `day` (days since the
    epoch), `used_before_nano` of the day before it.
    """

    open: int = 0
    day: int = 0
    used_nano: int = 0
    used_before_nano: int = 0
    requests_level: int | None = None
    requests_at_ms: int = 0
    tokens_level: int | None = None
    tokens_at_ms: int = 0


@dataclass(frozen=True, slots=True)
class Refunded:
    """One refund of a request."""

    operation_id: str
    amount_nano: int
    at_ms: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as the ledger knows it.

    `granted_nano` and `topped_up_nano` are held while the hold is live and charged once it is
    SETTLED. `tokens_taken` names the scopes whose token buckets paid `tokens`. The present hold
    began with `first_fence`; those below are of one that was released.
    """

    request_id: str
    key_id: str
    body_sha256: str
    state: State
    fence: int
    owner: str
    admitted_at_ms: int
    day: int
    lease_until_ms: int = 0
    in_full: bool = True
    tokens: int = 0
    tokens_taken: tuple[str, ...] = ()
    granted_nano: int = 0
    topped_up_nano: int = 0
    terms: str = ""
    checkpoint: str = ""
    attempts: int = 0
    orphaned_at_ms: int = 0
    decided_at_ms: int = 0
    content_sha256: str = ""
    posted: Posted | None = None
    refunds: tuple[Refunded, ...] = ()
    first_fence: int = 1

    @property
    def live(self) -> bool:
        """Whether money is held for it."""
        return self.state in {State.OPEN, State.ORPHAN}

    @property
    def amount_nano(self) -> int:
        """Held while live, charged once settled."""
        return self.granted_nano + self.topped_up_nano

    @property
    def refunded_nano(self) -> int:
        """What was given back of the charge."""
        return sum(refund.amount_nano for refund in self.refunds)


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """What moved; the postings (sub-account -> nano-units, none 0) add up to 0.

    `detail` is JSON: the record of a settlement, `{"reason", "unbilled"}` of a release,
    `{"note", ...}` of an operation, "" of the rest.
    """

    kind: str
    subject: str
    at_ms: int
    postings: Mapping[str, int]
    detail: str = ""


def _nothing() -> Mapping[str, int]:
    return MappingProxyType(dict.fromkeys(SUB_ACCOUNTS, 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """All that is kept of one tenant's money.

    `operations` maps an operation id to (its content, what it moved).
    """

    balances: Mapping[str, int] = field(default_factory=_nothing)
    limits: Mapping[str, Limits] = field(default_factory=dict)
    use: Mapping[str, Use] = field(default_factory=dict)
    requests: Mapping[str, Request] = field(default_factory=dict)
    operations: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    journal: tuple[JournalEntry, ...] = ()
    position: int = 0
    chain: str = FIRST_CHAIN

    @property
    def balance(self) -> Balance:
        """The balances that a customer sees."""
        return Balance(self.balances[GRANTED], self.balances[TOPPED_UP], self.balances[HOLD])
