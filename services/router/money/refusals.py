"""The ledger's refusals as errors that say what is used up, whose it is and when it ends."""

from datetime import UTC, datetime

from services.router.keys import Tenant
from tidemill.billing import format_amount
from tidemill.billing import ledger as rules
from tidemill.billing.hold_size import HoldSize
from tidemill.errors import (
    FailedPrecondition,
    InsufficientBalance,
    LimitExceeded,
    TidemillError,
)

_CONCURRENCY_RETRY_S = 1.0
_WORDS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "concurrency": "requests at once",
    "daily_budget_nano": "budget of the UTC day",
}


def refusal(refused: rules.Refused, tenant: Tenant, now_ms: int) -> TidemillError:
    """InsufficientBalance, or LimitExceeded with the ledger's reason and one quota.

    `metadata` holds need_nano, available_nano and currency of money, limit and resets_at_ms of
    limits; `retry_after_s` is set where waiting helps.
    """
    money = {
        "need_nano": str(refused.need_nano),
        "available_nano": str(refused.available_nano),
        "currency": tenant.currency,
    }
    need = format_amount(refused.need_nano, tenant.currency)
    available = format_amount(refused.available_nano, tenant.currency)
    if refused.reason is rules.Reason.INSUFFICIENT_BALANCE:
        return InsufficientBalance(
            f"the account has {available} free, the request needs {need}", metadata=money
        )
    whose = f"tenant:{tenant.id}" if refused.scope == rules.TENANT else refused.scope
    what = _WORDS[refused.limit]
    budget = refused.reason is rules.Reason.BUDGET_EXCEEDED
    until = f" until {_iso(refused.resets_at_ms)}" if refused.resets_at_ms else ""
    left = f": {available} left, the request needs {need}" if budget else ""
    return LimitExceeded(
        f"{what} of {whose} used up{until}{left}",
        reason=refused.reason.value,
        quotas=[(whose, what)],
        retry_after_s=_retry_after_s(refused, now_ms),
        metadata={
            "limit": refused.limit,
            "resets_at_ms": str(refused.resets_at_ms),
            **(money if budget else {}),
        },
    )


def max_cost_exceeded(size: HoldSize, currency: str) -> FailedPrecondition:
    """The refusal of a request whose cap does not pay for its prompt and first tokens.

    `metadata` holds least_nano, max_cost_nano and currency.
    """
    least = format_amount(size.first_nano, currency)
    return FailedPrecondition(
        "max_cost does not pay for the prompt and a first token of each choice: "
        f"that takes {least}, max_cost is {format_amount(size.most_nano, currency)}",
        reason="MAX_COST_EXCEEDED",
        metadata={
            "currency": currency,
            "least_nano": str(size.first_nano),
            "max_cost_nano": str(size.most_nano),
        },
    )


def _iso(at_ms: int) -> str:
    at = datetime.fromtimestamp(at_ms / 1000, UTC).replace(tzinfo=None)
    return f"{at.isoformat(timespec='milliseconds')}Z"


def _retry_after_s(refused: rules.Refused, now_ms: int) -> float:
    if not refused.resets_at_ms:
        return _CONCURRENCY_RETRY_S
    return max(refused.resets_at_ms - now_ms, 1) / 1000
