"""Limits of an account and its keys: token buckets, requests at once, a day's budget.

A bucket holds as much as its limit a minute allows and is refilled evenly. Its level is counted in
1/60,000 of a request or token, so that one millisecond adds exactly the limit. What is larger than
the bucket needs a full one and leaves it in debt. A clock that steps back adds nothing until it has
caught up, and the UTC day that requests count in never steps back.
"""

from dataclasses import dataclass, replace

from tidemill.billing.ledger_account import Use
from tidemill.billing.ledger_commands import MAX_NANO, Limits
from tidemill.billing.ledger_replies import Reason, Refused

SCALE = 60_000
DAY_MS = 86_400_000

Scoped = tuple[str, Limits, Use]


@dataclass(frozen=True, slots=True)
class LimitState:
    """A limit, what is left of it, and when it is whole again (0: as requests end)."""

    scope: str
    limit: str
    value: int
    remaining: int
    resets_at_ms: int


def refilled(level: int | None, at_ms: int, limit: int, now_ms: int) -> int:
    """A bucket's level now; None was never used, so it is full."""
    if level is None:
        return limit * SCALE
    return min(limit * SCALE, level + max(now_ms - at_ms, 0) * limit)


def when_filled(missing: int, at_ms: int, limit: int, now_ms: int) -> int:
    """When a bucket will have `missing` more than now."""
    return max(now_ms, at_ms) + -(-missing // limit)


def rolled(use: Use, day: int) -> Use:
    """`use` with `day` as its newest day, unless it has seen a later one."""
    if day <= use.day:
        return use
    before = use.used_nano if day == use.day + 1 else 0
    return replace(use, day=day, used_nano=0, used_before_nano=before)


def used_of(use: Use, day: int) -> int | None:
    """Held and settled of that day; None once two newer days have begun."""
    if day == use.day:
        return use.used_nano
    return use.used_before_nano if day == use.day - 1 else None


def spent(use: Use, day: int, nano: int) -> Use:
    """`use` with `nano` more (or less) of that day."""
    if day == use.day:
        return replace(use, used_nano=use.used_nano + nano)
    if day == use.day - 1:
        return replace(use, used_before_nano=use.used_before_nano + nano)
    return use


def rate_refusal(scoped: tuple[Scoped, ...], tokens: int, now_ms: int) -> Refused | None:
    """The first bucket that has too little for one more request of `tokens` tokens."""
    for scope, limits, use in scoped:
        if limit := limits.requests_per_minute:
            missing = SCALE - refilled(use.requests_level, use.requests_at_ms, limit, now_ms)
            if missing > 0:
                at_ms = when_filled(missing, use.requests_at_ms, limit, now_ms)
                return Refused(Reason.RATE_LIMITED, "requests_per_minute", scope, at_ms, 0, 0)
    for scope, limits, use in scoped:
        if limit := limits.tokens_per_minute:
            need = min(tokens, limit) * SCALE
            missing = need - refilled(use.tokens_level, use.tokens_at_ms, limit, now_ms)
            if missing > 0:
                at_ms = when_filled(missing, use.tokens_at_ms, limit, now_ms)
                return Refused(Reason.RATE_LIMITED, "tokens_per_minute", scope, at_ms, 0, 0)
    return None


def concurrency_refusal(scoped: tuple[Scoped, ...]) -> Refused | None:
    """The first scope that has as many live holds as it may."""
    for scope, limits, use in scoped:
        if limits.concurrency is not None and use.open >= limits.concurrency:
            return Refused(Reason.CONCURRENCY_LIMITED, "concurrency", scope, 0, 0, 0)
    return None


def budget_left(limits: Limits, use: Use, day: int) -> int:
    """What that day's budget still allows; no budget is one of MAX_NANO."""
    used = used_of(use, day)
    return MAX_NANO if used is None else (limits.daily_budget_nano or MAX_NANO) - used


def budget_refusal(
    scoped: tuple[Scoped, ...], day: int, need: int, resets_at_ms: int
) -> Refused | None:
    """The first scope whose budget of that day does not allow `need` nano-units more."""
    for scope, limits, use in scoped:
        left = budget_left(limits, use, day)
        if need > left:
            return Refused(
                Reason.BUDGET_EXCEEDED, "daily_budget_nano", scope, resets_at_ms, need, max(left, 0)
            )
    return None


def taken(limits: Limits, use: Use, tokens: int, now_ms: int) -> Use:
    """`use` with one request of `tokens` tokens out of its buckets."""
    if limit := limits.requests_per_minute:
        level = refilled(use.requests_level, use.requests_at_ms, limit, now_ms)
        at_ms = max(use.requests_at_ms, now_ms)
        use = replace(use, requests_level=level - SCALE, requests_at_ms=at_ms)
    if limit := limits.tokens_per_minute:
        level = refilled(use.tokens_level, use.tokens_at_ms, limit, now_ms)
        at_ms = max(use.tokens_at_ms, now_ms)
        use = replace(use, tokens_level=level - tokens * SCALE, tokens_at_ms=at_ms)
    return use


def put_back(limits: Limits, use: Use, tokens: int, now_ms: int) -> Use:
    """`use` with tokens that were reserved and not used back in its bucket, if it has one."""
    limit = limits.tokens_per_minute
    if limit is None:
        return use
    level = refilled(use.tokens_level, use.tokens_at_ms, limit, now_ms) + tokens * SCALE
    at_ms = max(use.tokens_at_ms, now_ms)
    return replace(use, tokens_level=min(level, limit * SCALE), tokens_at_ms=at_ms)


def limit_states(scope: str, limits: Limits, use: Use, now_ms: int) -> list[LimitState]:
    """What is left of each limit that is set."""
    states = []
    for name, limit, bucket, at_ms in (
        (
            "requests_per_minute",
            limits.requests_per_minute,
            use.requests_level,
            use.requests_at_ms,
        ),
        ("tokens_per_minute", limits.tokens_per_minute, use.tokens_level, use.tokens_at_ms),
    ):
        if limit:
            level = refilled(bucket, at_ms, limit, now_ms)
            whole_at_ms = when_filled(limit * SCALE - level, at_ms, limit, now_ms)
            remaining = max(level // SCALE, 0)
            states.append(LimitState(scope, name, limit, remaining, whole_at_ms))
    if limits.concurrency:
        left = max(limits.concurrency - use.open, 0)
        states.append(LimitState(scope, "concurrency", limits.concurrency, left, 0))
    if limits.daily_budget_nano:
        day = max(now_ms // DAY_MS, use.day)
        left = max(budget_left(limits, rolled(use, day), day), 0)
        states.append(
            LimitState(
                scope, "daily_budget_nano", limits.daily_budget_nano, left, (day + 1) * DAY_MS
            )
        )
    return states
