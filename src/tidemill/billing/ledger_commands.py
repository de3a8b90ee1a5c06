"""What may be asked of an account. Amounts and clocks are as `tidemill.billing.ledger` says."""

from dataclasses import dataclass

from tidemill.billing.integers import require_int

MAX_NANO = 2**53 - 1  # Lua counts in doubles
MAX_TOKENS = 2**31 - 1  # of one request: keeps the arithmetic of buckets exact in doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of an account or a key; None: no bound."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    daily_budget_nano: int | None = None

    def __post_init__(self) -> None:
        for name, most in (
            ("requests_per_minute", 10**7),
            ("tokens_per_minute", 10**11),
            ("concurrency", 10**6),
            ("daily_budget_nano", MAX_NANO),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= require_int(value, name) <= most:
                raise ValueError(f"{name} must be between 1 and {most}")


def _bounded(name: str, value: int, most: int, least: int = 0) -> None:
    if not least <= require_int(value, name) <= most:
        raise ValueError(f"{name} must be between {least} and {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Take a hold: of `full_nano` if that much is free, else of `least_nano`, else none.

    `max_tokens` counts all choices together. `terms` is what resolution and settlement need to
    know of the request, as JSON; the ledger only keeps it. Where the lease of a hold
    has run out it is taken over, but not within a lease of `ledger_up_since_ms`: its owner could
    not renew it while the ledger was away.
    """

    request_id: str
    key_id: str
    body_sha256: str
    owner: str
    now_ms: int
    lease_ms: int
    full_nano: int
    least_nano: int
    prompt_tokens: int
    max_tokens: int
    deadline_ms: int
    terms: str
    ledger_up_since_ms: int = 0

    def __post_init__(self) -> None:
        _bounded("full_nano", self.full_nano, MAX_NANO)
        _bounded("least_nano", self.least_nano, self.full_nano)
        _bounded("prompt_tokens + max_tokens", self.prompt_tokens + self.max_tokens, MAX_TOKENS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extend:
    """Hold `add_nano` more. The checkpoint (JSON) is written even if the money is refused."""

    request_id: str
    fence: int
    now_ms: int
    add_nano: int
    checkpoint: str

    def __post_init__(self) -> None:
        _bounded("add_nano", self.add_nano, MAX_NANO)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Write down how far the request is: what resolution bills if nothing newer is known."""

    request_id: str
    fence: int
    now_ms: int
    attempts: int
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    """Keep the holds (request id, fence) for another `lease_ms`."""

    owner: str
    now_ms: int
    lease_ms: int
    holds: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Charge `amount_nano`, free the rest of the hold, and chain the receipt's content hash.

    `record` is the receipt's content and what else is to be known of the request, as JSON.
    `total_tokens` is what counts against tokens per minute.
    """

    request_id: str
    fence: int
    now_ms: int
    decided_at_ms: int
    amount_nano: int
    content_sha256: str
    record: str
    total_tokens: int

    def __post_init__(self) -> None:
        _bounded("amount_nano", self.amount_nano, MAX_NANO)
        _bounded("total_tokens", self.total_tokens, MAX_TOKENS)
        if len(bytes.fromhex(self.content_sha256)) != 32:
            raise ValueError("content_sha256 must be 64 hexadecimal digits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Free the whole hold: nothing is billed. `unbilled` is a JSON object of token counts."""

    request_id: str
    fence: int
    now_ms: int
    unbilled: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """Take, for `owner` to resolve, a hold whose owner has vanished."""

    request_id: str
    now_ms: int
    lease_ms: int
    owner: str
    ledger_up_since_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TopUp:
    """Money was paid in."""

    operation_id: str
    now_ms: int
    amount_nano: int
    note: str = ""

    def __post_init__(self) -> None:
        _bounded("amount_nano", self.amount_nano, MAX_NANO, least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The operator gives money, which is spent first."""

    operation_id: str
    now_ms: int
    amount_nano: int
    note: str = ""

    def __post_init__(self) -> None:
        _bounded("amount_nano", self.amount_nano, MAX_NANO, least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """Give back part of a settled request's charge; None: all that is left of it."""

    operation_id: str
    now_ms: int
    request_id: str
    amount_nano: int | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.amount_nano is not None:
            _bounded("amount_nano", self.amount_nano, MAX_NANO, least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLimits:
    """Replace the limits of the account, or of one of its keys."""

    operation_id: str
    now_ms: int
    key_id: str | None
    limits: Limits


Operation = TopUp | Grant | Refund | SetLimits
Command = Reserve | Extend | Checkpoint | Renew | Settle | Release | Orphan | Operation
