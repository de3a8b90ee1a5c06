"""Holds: who may do what to a request's money, and when."""

import hashlib
from dataclasses import replace

import pytest

from tests.ledger_commands import LEASE_MS, NOON_MS, after, orphan, release, reserve, settle, sha256
from tidemill.billing import ledger as rules
from tidemill.billing.chain import FIRST_CHAIN

TERMS = '{"model":"demo"}'
LATE = NOON_MS + LEASE_MS


def account(*, granted: int = 0, topped_up: int = 0) -> rules.Account:
    books = rules.Account()
    if granted:
        command: rules.Command = rules.Grant(
            operation_id="granted", now_ms=NOON_MS, amount_nano=granted
        )
        books, _ = rules.apply(books, command)
    if topped_up:
        command = rules.TopUp(operation_id="paid", now_ms=NOON_MS, amount_nano=topped_up)
        books, _ = rules.apply(books, command)
    return books


def extend(**given: int) -> rules.Extend:
    fields = {"fence": 1, "now_ms": NOON_MS, "add_nano": 10} | given
    return rules.Extend(request_id="r1", checkpoint='{"split":1}', **fields)


def test_a_hold_takes_the_granted_balance_first() -> None:
    books, reply = after(account(granted=30, topped_up=100), reserve())
    assert reply == rules.Held(1, 100, True, NOON_MS, TERMS, "", 0)
    assert books.balance == rules.Balance(0, 30, 100)
    assert books.journal[-1] == rules.JournalEntry(
        "reserve", "r1", NOON_MS, {"granted": -30, "topped_up": -70, "hold": 100}
    )


def test_the_least_is_held_where_all_of_it_is_not_there_and_nothing_below_that() -> None:
    books, reply = after(account(topped_up=99), reserve(least_nano=40))
    assert reply == rules.Held(1, 40, False, NOON_MS, TERMS, "", 0)
    unchanged, reply = after(books, reserve("r2", least_nano=60))
    assert reply == rules.Refused(rules.Reason.INSUFFICIENT_BALANCE, "", rules.TENANT, 0, 60, 59)
    assert unchanged == books
    books, reply = after(books, reserve("r2", least_nano=59))
    assert books.balance == rules.Balance(0, 0, 99)


def test_a_price_of_nothing_holds_nothing_and_settles() -> None:
    books, reply = after(rules.Account(), reserve(full_nano=0, least_nano=0))
    assert isinstance(reply, rules.Held)
    books, reply = after(books, settle(amount_nano=0))
    assert isinstance(reply, rules.Posted)
    assert [entry.postings for entry in books.journal] == [{}, {}]


def test_settling_charges_granted_first_and_frees_the_rest_to_where_it_came_from() -> None:
    books, _ = after(account(granted=30, topped_up=100), reserve())
    books, reply = after(books, settle(amount_nano=42))
    assert reply == rules.Posted(
        position=1,
        previous_chain=FIRST_CHAIN,
        chain=hashlib.sha256(bytes(32) + bytes.fromhex(sha256("r1"))).hexdigest(),
        granted_nano=30,
        topped_up_nano=12,
        held_nano=100,
        duplicate=False,
        record='{"receipt":"r1"}',
    )
    assert books.balance == rules.Balance(0, 88, 0)
    assert books.journal[-1].postings == {"topped_up": 58, "hold": -100, "revenue": 42}
    assert books.journal[-1].detail == '{"receipt":"r1"}'


def test_a_second_settlement_answers_as_the_first_and_moves_nothing() -> None:
    books, first = after(account(topped_up=100), reserve(), settle())
    again = settle(fence=7, amount_nano=99, record="{}", content_sha256=sha256("other"))
    unchanged, reply = after(books, again)
    assert isinstance(first, rules.Posted)
    assert reply == replace(first, duplicate=True)
    assert unchanged == books


def test_more_than_was_held_is_never_charged() -> None:
    books, _ = after(account(topped_up=500), reserve())
    unchanged, reply = after(books, settle(amount_nano=101))
    assert reply == rules.AboveHold(100)
    assert unchanged == books
    _, reply = after(books, settle(amount_nano=100))
    assert isinstance(reply, rules.Posted)


def test_receipts_are_chained_in_the_order_of_settlement() -> None:
    books, _ = after(account(topped_up=500), reserve("a"), reserve("b"))
    books, first = after(books, settle("b"))
    books, second = after(books, settle("a"))
    assert isinstance(first, rules.Posted)
    assert isinstance(second, rules.Posted)
    assert second.previous_chain == first.chain
    link = bytes.fromhex(first.chain) + bytes.fromhex(sha256("a"))
    assert second.chain == hashlib.sha256(link).hexdigest() == books.chain
    assert (second.position, books.position) == (2, 2)


def test_a_live_request_is_in_progress_for_everybody_its_owner_too() -> None:
    books, _ = after(account(topped_up=500), reserve())
    for owner in ("router-a", "router-b"):
        unchanged, reply = after(books, reserve(owner=owner, now_ms=LATE - 1))
        assert reply == rules.InProgress(LATE)
        assert unchanged == books


@pytest.mark.parametrize("orphaned", [False, True])
def test_a_lease_that_ran_out_is_taken_over_as_it_stood(orphaned: bool) -> None:
    progress = rules.Checkpoint(
        request_id="r1", fence=1, now_ms=NOON_MS, attempts=2, checkpoint='{"split":1}'
    )
    limits = rules.SetLimits(
        operation_id="o", now_ms=NOON_MS, key_id=None, limits=rules.Limits(requests_per_minute=1)
    )
    books, _ = after(account(topped_up=100), limits, reserve(), progress)
    fence, now_ms = 1, LATE
    if orphaned:
        books, _ = after(books, orphan(now_ms=LATE))
        fence, now_ms = 2, LATE + LEASE_MS
    other_terms = reserve(owner="router-b", now_ms=now_ms, full_nano=400, least_nano=400, terms="")
    taken, reply = after(books, other_terms)
    assert reply == rules.Held(fence + 1, 100, True, NOON_MS, TERMS, '{"split":1}', 2)
    assert taken.requests["r1"].state == rules.State.OPEN
    assert taken.requests["r1"].owner == "router-b"
    assert taken.use == books.use
    assert taken.journal == books.journal
    _, reply = after(taken, settle(fence=fence))
    assert reply == rules.Stale(fence + 1, rules.State.OPEN)
    _, reply = after(taken, settle(fence=fence + 1))
    assert isinstance(reply, rules.Posted)


def test_another_body_under_a_known_id_is_refused_in_every_state() -> None:
    other = reserve(body_sha256=sha256("other"), now_ms=LATE)
    books, _ = after(account(topped_up=500), reserve())
    for ending in (None, settle(), release()):
        ended = after(books, ending)[0] if ending else books
        unchanged, reply = after(ended, other)
        assert reply == rules.OtherBody()
        assert unchanged == ended


def test_a_settled_request_answers_with_its_record() -> None:
    books, posted = after(account(topped_up=500), reserve(), settle())
    unchanged, reply = after(books, reserve(now_ms=LATE))
    assert isinstance(posted, rules.Posted)
    assert reply == rules.Settled(replace(posted, duplicate=True))
    assert isinstance(reply, rules.Settled)
    assert reply.record == '{"receipt":"r1"}'
    assert unchanged == books


def test_a_released_id_lives_again_under_the_next_fence_with_everything_counted_anew() -> None:
    books, _ = after(account(topped_up=500), reserve(), release())
    assert books.balance == rules.Balance(0, 500, 0)
    books, reply = after(books, reserve(now_ms=LATE, full_nano=70, terms="{}"))
    assert reply == rules.Held(2, 70, True, LATE, "{}", "", 0, first_fence=2)
    _, reply = after(books, release(fence=1))
    assert reply == rules.Stale(2, rules.State.OPEN)
    _, reply = after(books, settle(fence=2))
    assert isinstance(reply, rules.Posted)


def test_what_ended_an_earlier_life_of_an_id_never_ends_the_present_one() -> None:
    books, _ = after(account(topped_up=500), reserve(), release(), reserve(now_ms=LATE))
    books, reply = after(books, orphan(now_ms=LATE + LEASE_MS))
    assert isinstance(reply, rules.Orphaned)
    assert (reply.fence, reply.first_fence) == (3, 2)
    for ending in (release(fence=1), settle(fence=1)):
        unchanged, reply = after(books, ending)
        assert reply == rules.Stale(3, rules.State.ORPHAN)
        assert unchanged == books
    for fence in (2, 3):
        assert after(books, release(fence=fence))[1] == rules.Released()


def test_releasing_bills_nothing_says_why_and_may_be_repeated() -> None:
    books, reply = after(account(granted=60, topped_up=60), reserve(), release())
    assert reply == rules.Released()
    assert books.journal[-1] == rules.JournalEntry(
        "release",
        "r1",
        NOON_MS,
        {"granted": 60, "topped_up": 40, "hold": -100},
        '{"reason":"SERVER_FAULT","unbilled":{"lost":3}}',
    )
    unchanged, reply = after(books, release())
    assert reply == rules.Released()
    assert unchanged == books
    unchanged, reply = after(books, settle())
    assert reply == rules.Stale(1, rules.State.RELEASED)
    assert unchanged == books


def test_a_settled_request_cannot_be_released() -> None:
    books, _ = after(account(topped_up=100), reserve(), settle())
    unchanged, reply = after(books, release())
    assert reply == rules.Stale(1, rules.State.SETTLED)
    assert unchanged == books


def test_extending_holds_more_granted_first_and_keeps_the_checkpoint_even_if_refused() -> None:
    books, _ = after(account(granted=105, topped_up=10), reserve())
    books, reply = after(books, extend(add_nano=12))
    assert reply == rules.Extended(112)
    assert books.journal[-1].postings == {"granted": -5, "topped_up": -7, "hold": 12}
    refused, reply = after(books, replace(extend(add_nano=4), checkpoint="newer"))
    assert reply == rules.Refused(rules.Reason.INSUFFICIENT_BALANCE, "", rules.TENANT, 0, 4, 3)
    assert refused.requests["r1"].checkpoint == "newer"
    assert replace(refused, requests=books.requests) == books


@pytest.mark.parametrize("fence", [0, 2])
def test_a_fence_that_is_not_the_present_one_changes_nothing(fence: int) -> None:
    books, _ = after(account(topped_up=500), reserve())
    checkpoint = rules.Checkpoint(
        request_id="r1", fence=fence, now_ms=NOON_MS, attempts=1, checkpoint="{}"
    )
    for command in (
        extend(fence=fence),
        checkpoint,
        settle(fence=fence),
        release(fence=fence),
    ):
        unchanged, reply = after(books, command)
        assert reply == rules.Stale(1, rules.State.OPEN)
        assert unchanged == books


def test_nothing_is_known_of_a_request_that_never_came() -> None:
    for command in (extend(), settle(), release()):
        _, reply = after(rules.Account(), command)
        assert reply == rules.Stale(0, rules.State.UNKNOWN)
    _, reply = after(rules.Account(), orphan())
    assert reply == rules.NotYet()


def test_renewing_keeps_what_is_ones_own_and_names_the_rest() -> None:
    books, _ = after(account(topped_up=500), reserve("a"), reserve("b"), reserve("c"), reserve("d"))
    books, _ = after(books, settle("b"), orphan("c", now_ms=LATE))
    renew = rules.Renew(
        owner="router-a",
        now_ms=LATE,
        lease_ms=LEASE_MS,
        holds=(("a", 1), ("b", 1), ("c", 1), ("d", 2), ("e", 1)),
    )
    books, reply = after(books, renew)
    assert reply == rules.Renewed(("b", "c", "d", "e"))
    assert books.requests["a"].lease_until_ms == LATE + LEASE_MS
    assert books.requests["d"].lease_until_ms == LATE
    _, reply = after(books, replace(renew, owner="router-b", holds=(("a", 1),)))
    assert reply == rules.Renewed(("a",))


def test_an_orphan_frees_no_money_and_its_resolver_has_the_next_fence() -> None:
    books, _ = after(account(topped_up=500), reserve(), extend())
    unchanged, reply = after(books, orphan(now_ms=LATE - 1))
    assert reply == rules.NotYet()
    assert unchanged == books
    orphaned, reply = after(books, orphan(now_ms=LATE))
    assert reply == rules.Orphaned(2, TERMS, '{"split":1}', 0, 110, NOON_MS, LATE)
    assert orphaned.balance == books.balance
    _, reply = after(orphaned, orphan(now_ms=LATE + LEASE_MS - 1, owner="another"))
    assert reply == rules.NotYet()
    again, reply = after(orphaned, orphan(now_ms=LATE + LEASE_MS, owner="another"))
    assert reply == rules.Orphaned(3, TERMS, '{"split":1}', 0, 110, NOON_MS, LATE)
    assert again.requests["r1"].owner == "another"


def test_nothing_turns_orphan_for_one_lease_after_the_ledger_came_back() -> None:
    books, _ = after(account(topped_up=500), reserve())
    now_ms = LATE + 1000
    back = orphan(now_ms=now_ms, ledger_up_since_ms=now_ms - LEASE_MS + 1)
    unchanged, reply = after(books, back)
    assert reply == rules.NotYet()
    assert unchanged == books
    books, reply = after(books, replace(back, ledger_up_since_ms=now_ms - LEASE_MS))
    assert isinstance(reply, rules.Orphaned)
    # Nor is it taken over.
    asked = reserve(now_ms=now_ms, ledger_up_since_ms=now_ms - 1)
    _, reply = after(unchanged, asked)
    assert reply == rules.InProgress(now_ms - 1 + LEASE_MS)
    _, reply = after(unchanged, replace(asked, ledger_up_since_ms=now_ms - LEASE_MS))
    assert isinstance(reply, rules.Held)
    # What is an orphan already has nobody to come back to it.
    later = orphan(now_ms=now_ms + LEASE_MS, ledger_up_since_ms=now_ms + LEASE_MS)
    _, reply = after(books, later)
    assert isinstance(reply, rules.Orphaned)


def test_an_owner_that_lives_after_all_may_still_end_an_orphan() -> None:
    books, _ = after(account(topped_up=500), reserve(), orphan(now_ms=LATE))
    for command, expected in ((settle(fence=1), rules.Posted), (release(fence=1), rules.Released)):
        _, reply = after(books, command)
        assert isinstance(reply, expected)
    _, reply = after(books, settle(fence=3))
    assert reply == rules.Stale(2, rules.State.ORPHAN)
    _, reply = after(books, extend(fence=1))
    assert reply == rules.Stale(2, rules.State.ORPHAN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("full_nano", rules.MAX_NANO + 1),
        ("full_nano", -1),
        ("least_nano", 101),
        ("max_tokens", rules.MAX_TOKENS),
    ],
)
def test_a_reservation_out_of_bounds_cannot_be_made(field: str, value: int) -> None:
    with pytest.raises(ValueError, match="must be between"):
        reserve("r1", **{field: value})


def test_a_float_is_no_amount() -> None:
    with pytest.raises(TypeError, match="amount_nano"):
        settle(amount_nano=1.0)
