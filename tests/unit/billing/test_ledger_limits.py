"""Token buckets, requests at once and daily budgets, to the millisecond and the nano-unit."""

from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ledger_commands import LEASE_MS, NOON_MS, after, orphan, release, reserve, settle
from tidemill.billing import ledger as rules
from tidemill.billing.ledger_limits import DAY_MS, SCALE, refilled, when_filled

LATER_MIDNIGHT = (NOON_MS // DAY_MS + 1) * DAY_MS


def account(
    limits: rules.Limits | None = None, *, key: rules.Limits | None = None
) -> rules.Account:
    made, _ = rules.apply(
        rules.Account(), rules.TopUp(operation_id="paid", now_ms=NOON_MS, amount_nano=10_000)
    )
    for key_id, given_limits in ((None, limits), ("k1", key)):
        if given_limits:
            command = rules.SetLimits(
                operation_id=f"limits {key_id}", now_ms=NOON_MS, key_id=key_id, limits=given_limits
            )
            made, _ = rules.apply(made, command)
    return made


def refused(reply: rules.Reply) -> rules.Refused:
    assert isinstance(reply, rules.Refused), reply
    return reply


def test_a_bucket_lets_its_limit_through_at_once_and_says_when_the_next_may_come() -> None:
    books = account(rules.Limits(requests_per_minute=3))
    for number in range(3):
        books, reply = after(books, reserve(f"r{number}"))
        assert isinstance(reply, rules.Held)
    books, reply = after(books, reserve("r3", now_ms=NOON_MS + 1))
    assert refused(reply).reason == rules.Reason.RATE_LIMITED
    assert refused(reply).limit == "requests_per_minute"
    assert refused(reply).resets_at_ms == NOON_MS + 20_000
    _, reply = after(books, reserve("r3", now_ms=NOON_MS + 19_999))
    assert refused(reply).resets_at_ms == NOON_MS + 20_000
    _, reply = after(books, reserve("r3", now_ms=NOON_MS + 20_000))
    assert isinstance(reply, rules.Held)


def test_tokens_are_taken_at_their_maximum_and_what_was_not_used_comes_back() -> None:
    books = account(rules.Limits(tokens_per_minute=30))
    books, _ = after(books, reserve("r1"))  # 20 tokens
    _, reply = after(books, reserve("r2"))
    assert refused(reply).limit == "tokens_per_minute"
    assert refused(reply).resets_at_ms == NOON_MS + 20_000
    settled, _ = after(books, settle("r1", total_tokens=9))
    _, reply = after(settled, reserve("r2"))
    assert isinstance(reply, rules.Held)
    settled, _ = after(books, settle("r1", total_tokens=11))
    _, reply = after(settled, reserve("r2"))
    assert refused(reply).resets_at_ms == NOON_MS + 2_000
    released, _ = after(books, release("r1"))
    _, reply = after(released, reserve("r2"))
    assert isinstance(reply, rules.Held)


def test_tokens_come_back_only_to_buckets_that_gave_them() -> None:
    books = account(key=rules.Limits(tokens_per_minute=1000))
    books, _ = after(books, reserve("r1"))
    limits = rules.Limits(tokens_per_minute=20)
    set_now = rules.SetLimits(operation_id="o", now_ms=NOON_MS, key_id=None, limits=limits)
    books, _ = after(books, set_now, reserve("r2", max_tokens=10), settle("r1", total_tokens=0))
    assert books.use[rules.TENANT].tokens_level == 5 * SCALE
    assert books.use["key:k1"].tokens_level == (1000 - 15) * SCALE


def test_a_request_larger_than_its_bucket_needs_a_full_one_and_leaves_it_in_debt() -> None:
    books = account(rules.Limits(tokens_per_minute=10))
    books, reply = after(books, reserve("r1"))  # 20 tokens
    assert isinstance(reply, rules.Held)
    _, reply = after(books, reserve("r2", prompt_tokens=1, max_tokens=0))
    assert refused(reply).resets_at_ms == NOON_MS + 66_000
    _, reply = after(books, reserve("r2", now_ms=NOON_MS + 100_000))
    assert refused(reply).resets_at_ms == NOON_MS + 120_000
    _, reply = after(books, reserve("r2", now_ms=NOON_MS + 120_000))
    assert isinstance(reply, rules.Held)


def test_a_refusal_takes_nothing_from_any_bucket() -> None:
    books = account(
        rules.Limits(requests_per_minute=9, tokens_per_minute=90), key=rules.Limits(concurrency=1)
    )
    books, _ = after(books, reserve("r1"))
    unchanged, reply = after(books, reserve("r2", now_ms=NOON_MS + 1))
    assert refused(reply).reason == rules.Reason.CONCURRENCY_LIMITED
    assert refused(reply).scope == "key:k1"
    assert unchanged == books


def test_a_clock_that_steps_back_refills_nothing_twice() -> None:
    books = account(rules.Limits(requests_per_minute=1))
    books, _ = after(books, reserve("r1"), reserve("r2", now_ms=NOON_MS - 60_000))
    _, reply = after(books, reserve("r2", now_ms=NOON_MS - 60_000))
    assert refused(reply).resets_at_ms == NOON_MS + 60_000
    _, reply = after(books, reserve("r2", now_ms=NOON_MS + 59_999))
    assert refused(reply).resets_at_ms == NOON_MS + 60_000


def test_orphans_count_as_requests_at_once_until_they_are_resolved() -> None:
    books = account(rules.Limits(concurrency=1))
    later = NOON_MS + LEASE_MS
    books, reply = after(books, reserve("r1"), orphan("r1", now_ms=later))
    assert isinstance(reply, rules.Orphaned)
    _, reply = after(books, reserve("r2", now_ms=later))
    assert refused(reply).reason == rules.Reason.CONCURRENCY_LIMITED
    assert refused(reply).resets_at_ms == 0
    books, _ = after(books, release("r1", fence=2, now_ms=later))
    _, reply = after(books, reserve("r2", now_ms=later))
    assert isinstance(reply, rules.Held)


@pytest.mark.parametrize("scope", ["tenant", "key:k1"])
def test_a_budget_counts_held_and_settled_of_its_utc_day(scope: str) -> None:
    limits = rules.Limits(daily_budget_nano=150)
    books = account(limits) if scope == "tenant" else account(key=limits)
    books, _ = after(books, reserve("r1"))
    held_least, reply = after(books, reserve("r2", least_nano=50))
    assert reply == rules.Held(1, 50, False, NOON_MS, '{"model":"demo"}', "", 0)
    assert not held_least.requests["r2"].in_full
    _, reply = after(books, reserve("r2", least_nano=51))
    assert refused(reply) == rules.Refused(
        rules.Reason.BUDGET_EXCEEDED, "daily_budget_nano", scope, LATER_MIDNIGHT, 51, 50
    )
    settled, _ = after(books, settle("r1", amount_nano=99))
    _, reply = after(settled, reserve("r2", least_nano=51))
    assert isinstance(reply, rules.Held)
    assert reply.held_nano == 51


def test_a_budget_begins_anew_at_midnight_utc_and_an_old_request_still_counts_in_its_own_day() -> (
    None
):
    books = account(rules.Limits(daily_budget_nano=150))
    books, _ = after(books, reserve("r1", now_ms=LATER_MIDNIGHT - 1))
    _, reply = after(books, reserve("r2", now_ms=LATER_MIDNIGHT - 1, least_nano=100))
    assert refused(reply).resets_at_ms == LATER_MIDNIGHT
    books, reply = after(books, reserve("r2", now_ms=LATER_MIDNIGHT, least_nano=100))
    assert isinstance(reply, rules.Held)
    extend = rules.Extend(
        request_id="r1", fence=1, now_ms=LATER_MIDNIGHT, add_nano=51, checkpoint="{}"
    )
    refused_more, reply = after(books, extend)
    assert refused(reply).reason == rules.Reason.BUDGET_EXCEEDED
    assert refused_more.requests["r1"].checkpoint == "{}"
    books, reply = after(books, replace(extend, add_nano=50))
    assert reply == rules.Extended(150)
    books, _ = after(books, settle("r1", amount_nano=120, now_ms=LATER_MIDNIGHT))
    assert books.use[rules.TENANT].used_nano == 100
    assert books.use[rules.TENANT].used_before_nano == 120


def test_a_request_of_two_days_ago_no_longer_counts() -> None:
    books = account(rules.Limits(daily_budget_nano=150))
    books, _ = after(books, reserve("r1"))
    books, _ = after(books, reserve("r2", now_ms=NOON_MS + 2 * DAY_MS))
    books, _ = after(books, settle("r1", amount_nano=0))
    use = books.use[rules.TENANT]
    assert (use.used_nano, use.used_before_nano) == (100, 0)


def test_a_day_never_steps_back() -> None:
    books = account(rules.Limits(daily_budget_nano=150))
    books, _ = after(books, reserve("r1", now_ms=LATER_MIDNIGHT))
    _, reply = after(books, reserve("r2", now_ms=LATER_MIDNIGHT - 1, least_nano=51))
    assert refused(reply).resets_at_ms == LATER_MIDNIGHT + DAY_MS


def test_limits_refuse_in_order_rates_before_concurrency_before_budget_before_balance() -> None:
    tight = rules.Limits(
        requests_per_minute=1, tokens_per_minute=20, concurrency=1, daily_budget_nano=100
    )
    asked = reserve("r2", full_nano=20_000, least_nano=20_000)
    for loosened, limit in (
        ({}, "requests_per_minute"),
        ({"requests_per_minute": None}, "tokens_per_minute"),
        ({"requests_per_minute": None, "tokens_per_minute": None}, "concurrency"),
    ):
        books, _ = after(account(replace(tight, **loosened)), reserve("r1"))
        _, reply = after(books, asked)
        assert refused(reply).limit == limit
    _, reply = after(account(rules.Limits(daily_budget_nano=100)), asked)
    assert refused(reply).limit == "daily_budget_nano"
    _, reply = after(account(), asked)
    assert refused(reply) == rules.Refused(
        rules.Reason.INSUFFICIENT_BALANCE, "", rules.TENANT, 0, 20_000, 10_000
    )


def test_what_is_left_of_each_limit_and_when_it_is_whole() -> None:
    limits = rules.Limits(
        requests_per_minute=6, tokens_per_minute=60, concurrency=4, daily_budget_nano=150
    )
    books, _ = after(account(limits), reserve("r1"), reserve("r2", now_ms=NOON_MS + 5_000))
    now_ms = NOON_MS + 5_000
    states = rules.limit_states(rules.TENANT, limits, books.use[rules.TENANT], now_ms)
    assert [
        (state.limit, state.value, state.remaining, state.resets_at_ms) for state in states
    ] == [
        ("requests_per_minute", 6, 4, now_ms + 15_000),
        ("tokens_per_minute", 60, 25, now_ms + 35_000),
        ("concurrency", 4, 2, 0),
        ("daily_budget_nano", 150, 40, LATER_MIDNIGHT),
    ]
    whole = rules.limit_states(rules.TENANT, limits, books.use[rules.TENANT], LATER_MIDNIGHT)
    assert [state.remaining for state in whole] == [6, 60, 2, 150]


def test_no_limits_leave_nothing_to_tell() -> None:
    assert rules.limit_states(rules.TENANT, rules.Limits(), rules.Use(), NOON_MS) == []


@given(
    limit=st.integers(1, 10**11),
    level=st.integers(-(2**31) * SCALE, 10**11 * SCALE),
    waited=st.integers(0, 10**7),
    missing=st.integers(1, 10**11 * SCALE),
)
def test_a_bucket_is_as_full_as_time_says_and_never_a_millisecond_early(
    limit: int, level: int, waited: int, missing: int
) -> None:
    level = min(level, limit * SCALE)
    now = refilled(level, NOON_MS, limit, NOON_MS + waited)
    assert Fraction(now, SCALE) == min(
        Fraction(limit), Fraction(level, SCALE) + Fraction(waited * limit, 60_000)
    )
    ready = when_filled(missing, NOON_MS, limit, NOON_MS) - NOON_MS
    assert ready * limit >= missing > (ready - 1) * limit


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("requests_per_minute", 0),
        ("requests_per_minute", 10**7 + 1),
        ("tokens_per_minute", 10**11 + 1),
        ("concurrency", -1),
        ("daily_budget_nano", rules.MAX_NANO + 1),
    ],
)
def test_a_limit_out_of_bounds_is_no_limit(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        rules.Limits(**{field: value})
