"""Each edge of the rules once, on a real Redis: the scripts answer and keep what the rules say."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from services.router.money.accounts import Accounts
from tests.ledger_commands import LEASE_MS, NOON_MS, orphan, release, reserve, send, settle
from tidemill.billing import ledger as rules
from tidemill.billing.ledger_limits import DAY_MS

pytestmark = pytest.mark.redis

LATE = NOON_MS + LEASE_MS
PAID = rules.TopUp(operation_id="paid", now_ms=NOON_MS, amount_nano=250)
GIVEN = rules.Grant(operation_id="given", now_ms=NOON_MS, amount_nano=70)
EXTEND = rules.Extend(request_id="r1", fence=1, now_ms=NOON_MS, add_nano=60, checkpoint="{}")
CHECKPOINT = rules.Checkpoint(
    request_id="r1", fence=1, now_ms=NOON_MS, attempts=1, checkpoint='{"split":1}'
)


def limited(key_id: str | None, operation_id: str = "limits", **limits: int) -> rules.SetLimits:
    return rules.SetLimits(
        operation_id=operation_id, now_ms=NOON_MS, key_id=key_id, limits=rules.Limits(**limits)
    )


def renew(fence: int = 1, owner: str = "router-a") -> rules.Renew:
    return rules.Renew(owner=owner, now_ms=LATE, lease_ms=LEASE_MS, holds=(("r1", fence),))


def refund(operation_id: str, amount: int | None) -> rules.Refund:
    return rules.Refund(
        operation_id=operation_id, now_ms=NOON_MS, request_id="r1", amount_nano=amount
    )


def scoped(key_id: str | None, **limits: int) -> list[rules.Command]:
    """The limits on one scope; three requests, the first of which ends before the last comes."""
    return [
        limited(key_id, "limits", **limits),
        PAID,
        reserve("r1"),
        reserve("r2"),
        reserve("r3", now_ms=NOON_MS + 1),
        settle("r1"),
        reserve("r3", now_ms=NOON_MS + 2),
        reserve("r3", now_ms=NOON_MS + 61_000, least_nano=1),
    ]


HOLD: list[rules.Command] = [PAID, GIVEN, reserve()]
SCENARIOS: dict[str, Sequence[rules.Command]] = {
    "granted first, then more than both": [*HOLD, EXTEND, replace(EXTEND, add_nano=161), settle()],
    "the least where not all is there": [PAID, reserve(full_nano=251, least_nano=250)],
    "a nano-unit too much": [PAID, reserve(full_nano=252, least_nano=251)],
    "another body": [*HOLD, reserve(body_sha256="00"), release(), reserve(body_sha256="00")],
    "in progress to the last millisecond": [*HOLD, reserve(now_ms=LATE - 1)],
    "taken over at the lease's end": [
        *HOLD,
        CHECKPOINT,
        reserve(now_ms=LATE, owner="router-b", full_nano=10, terms="other"),
        settle(),
        settle(fence=2),
    ],
    "no takeover within a lease of a restart": [
        *HOLD,
        reserve(now_ms=LATE, ledger_up_since_ms=NOON_MS + 1),
        reserve(now_ms=LATE + 1, ledger_up_since_ms=NOON_MS + 1),
    ],
    "no orphan within a lease of a restart": [
        *HOLD,
        orphan(now_ms=LATE, ledger_up_since_ms=NOON_MS + 1),
        orphan(now_ms=LATE + 1, ledger_up_since_ms=NOON_MS + 1),
        orphan(now_ms=LATE + LEASE_MS, ledger_up_since_ms=LATE),
        orphan(now_ms=LATE + LEASE_MS + 1, ledger_up_since_ms=LATE + LEASE_MS),
    ],
    "an orphan is taken over too": [
        *HOLD,
        orphan(now_ms=LATE),
        reserve(now_ms=LATE + LEASE_MS - 1),
        reserve(now_ms=LATE + LEASE_MS, ledger_up_since_ms=LATE + LEASE_MS),
    ],
    "an orphan settled by its first owner": [*HOLD, orphan(now_ms=LATE), settle(fence=1)],
    "an orphan released by its first owner": [*HOLD, orphan(now_ms=LATE), release(fence=1)],
    "an orphan and a fence that was never given": [*HOLD, orphan(now_ms=LATE), settle(fence=3)],
    "an orphan frees nothing": [
        *HOLD,
        orphan(now_ms=LATE),
        reserve("r2", full_nano=300, least_nano=221),
    ],
    "a settled request": [*HOLD, settle(), settle(amount_nano=31), reserve(), release()],
    "a released one lives again": [*HOLD, release(), release(), reserve(), release(), settle()],
    "a released one is not settled": [*HOLD, release(), settle(), EXTEND, CHECKPOINT],
    "above the hold": [*HOLD, settle(amount_nano=101), settle(amount_nano=100)],
    "unknown": [settle(), release(), EXTEND, CHECKPOINT, orphan(), renew(), refund("a", None)],
    "renewed by its owner only": [*HOLD, renew(2), renew(owner="router-b"), renew()],
    "a renewed hold is no orphan": [*HOLD, renew(), orphan(now_ms=LATE + LEASE_MS - 1)],
    "refunds, paid in first": [
        *HOLD,
        settle(amount_nano=100),
        refund("a", 20),
        refund("b", 20),
        refund("c", 61),
        refund("a", 20),
        refund("a", 21),
        refund("d", None),
        refund("e", None),
    ],
    "operations once": [PAID, PAID, replace(PAID, amount_nano=1), replace(PAID, now_ms=LATE)],
    "the most that is kept": [
        PAID,
        replace(GIVEN, amount_nano=rules.MAX_NANO - 249),
        replace(GIVEN, amount_nano=rules.MAX_NANO - 250),
    ],
    "requests a minute": scoped(None, requests_per_minute=2),
    "requests a minute of a key": scoped("k1", requests_per_minute=2),
    "tokens a minute": scoped(None, tokens_per_minute=40),
    "tokens a minute of a key": scoped("k1", tokens_per_minute=40),
    "larger than the bucket": scoped(None, tokens_per_minute=7),
    "requests at once": scoped(None, concurrency=2),
    "requests at once of a key": scoped("k1", concurrency=2),
    "a day's budget": scoped(None, daily_budget_nano=201),
    "a day's budget of a key": scoped("k1", daily_budget_nano=201),
    "a key that is called as the account's scope": [
        limited(None, tokens_per_minute=100),
        limited("tenant", operation_id="other", tokens_per_minute=90),
        PAID,
        reserve(key_id="tenant"),
        limited(None, operation_id="none"),
        settle(),
    ],
    "only buckets that gave get back": [
        limited("tenant", tokens_per_minute=90),
        PAID,
        reserve(key_id="tenant"),
        limited(None, operation_id="late", tokens_per_minute=100),
        reserve("r2", key_id="tenant"),
        settle(total_tokens=0),
    ],
    "a budget over midnight": [
        limited(None, daily_budget_nano=150),
        PAID,
        reserve(),
        reserve("r2", now_ms=NOON_MS + DAY_MS),
        replace(EXTEND, add_nano=51),
        replace(EXTEND, add_nano=50),
        settle(amount_nano=20),
        reserve("r3", now_ms=NOON_MS + 3 * DAY_MS),
        settle("r2", amount_nano=20),
        reserve("r4"),  # a clock that stepped back
    ],
}


@pytest.mark.parametrize("name", SCENARIOS)
async def test_scripts_do_as_the_rules_say(accounts: Accounts, name: str) -> None:
    tenant_id = name.replace(" ", "-")
    model = rules.Account()
    for command in SCENARIOS[name]:
        model, expected = rules.apply(model, command)
        assert await send(accounts, tenant_id, command) == expected, command
        stored = await accounts.read(tenant_id)
        assert rules.check(stored) == []
        assert stored.requests == model.requests
        assert stored.journal == model.journal
        assert stored.operations == model.operations
        assert {scope: stored.use[scope] for scope in model.use} == model.use
