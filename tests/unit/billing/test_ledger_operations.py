"""Top-ups, grants, refunds and limits: once per operation id; and that `check` finds faults."""

from dataclasses import replace
from typing import Any

import pytest

from tests.ledger_commands import NOON_MS, after, reserve, settle
from tidemill.billing import ledger as rules


def top_up(amount: int = 100, operation_id: str = "o1", **given: Any) -> rules.TopUp:
    now_ms = given.pop("now_ms", NOON_MS)
    return rules.TopUp(operation_id=operation_id, now_ms=now_ms, amount_nano=amount, **given)


def grant(amount: int = 100, operation_id: str = "o1") -> rules.Grant:
    return rules.Grant(operation_id=operation_id, now_ms=NOON_MS, amount_nano=amount)


def refund(amount: int | None, operation_id: str, request_id: str = "r1") -> rules.Refund:
    return rules.Refund(
        operation_id=operation_id,
        now_ms=NOON_MS + 5,
        request_id=request_id,
        amount_nano=amount,
        note="sorry",
    )


def settled() -> rules.Account:
    """60 of 90 granted and 20 of 100 topped up were charged for r1."""
    books, _ = after(rules.Account(), grant(60, "g"), top_up(100, "t"), reserve())
    books, _ = after(books, settle(amount_nano=80), grant(30, "g2"))
    return books


def test_top_ups_and_grants_are_booked_against_their_counters() -> None:
    books, reply = after(rules.Account(), top_up(70), grant(30, "o2"))
    assert reply == rules.Applied(True, 30, rules.Balance(30, 70, 0))
    assert books.balances["paid_in"] == -70
    assert books.balances["adjustment"] == -30
    assert [entry.kind for entry in books.journal] == ["top_up", "grant"]
    assert books.journal[0].detail == '{"note":""}'


def test_an_operation_takes_effect_once_however_late_it_comes_again() -> None:
    books, _ = after(rules.Account(), top_up(), reserve())
    unchanged, reply = after(books, top_up(now_ms=NOON_MS + 999))
    assert reply == rules.Applied(False, 100, rules.Balance(0, 0, 100))
    assert unchanged == books


@pytest.mark.parametrize("other", [top_up(101), top_up(note="other"), grant(), refund(100, "o1")])
def test_an_operation_id_stands_for_one_content(other: rules.Command) -> None:
    books, _ = after(rules.Account(), top_up())
    unchanged, reply = after(books, other)
    assert reply == rules.OtherContent()
    assert unchanged == books


def test_no_account_keeps_more_than_can_be_counted_exactly() -> None:
    books, reply = after(rules.Account(), top_up(rules.MAX_NANO - 150), reserve(), grant(150, "g"))
    assert isinstance(reply, rules.Applied)
    for command in (top_up(1, "o2"), grant(1, "o2")):
        unchanged, reply = after(books, command)
        assert reply == rules.TooMuch(0)
        assert unchanged == books


def test_a_refund_returns_what_was_paid_in_first_and_never_more_than_the_charge() -> None:
    books, reply = after(settled(), refund(15, "a"))
    assert reply == rules.Applied(True, 15, rules.Balance(30, 95, 0))
    books, reply = after(books, refund(15, "b"))
    assert books.journal[-1].postings == {"revenue": -15, "topped_up": 5, "granted": 10}
    assert books.journal[-1].detail == '{"note":"sorry","request_id":"r1"}'
    unchanged, reply = after(books, refund(51, "c"))
    assert reply == rules.TooMuch(50)
    assert unchanged == books
    books, reply = after(books, refund(None, "d"))
    assert reply == rules.Applied(True, 50, rules.Balance(90, 100, 0))
    _, reply = after(books, refund(None, "e"))
    assert reply == rules.TooMuch(0)
    assert books.requests["r1"].refunds == (
        rules.Refunded("a", 15, NOON_MS + 5, "sorry"),
        rules.Refunded("b", 15, NOON_MS + 5, "sorry"),
        rules.Refunded("d", 50, NOON_MS + 5, "sorry"),
    )
    _, reply = after(books, refund(None, "d"))
    assert reply == rules.Applied(False, 50, rules.Balance(90, 100, 0))


def test_a_refund_that_the_account_cannot_keep_is_refused() -> None:
    books, _ = after(settled(), top_up(rules.MAX_NANO - 110 - 9, "rich"))
    _, reply = after(books, refund(10, "a"))
    assert reply == rules.TooMuch(9)
    _, reply = after(books, refund(9, "a"))
    assert isinstance(reply, rules.Applied)


def test_only_what_was_settled_is_refunded() -> None:
    _, reply = after(rules.Account(), refund(None, "a"))
    assert reply == rules.NotSettled(rules.State.UNKNOWN)
    books, _ = after(rules.Account(), top_up(), reserve())
    unchanged, reply = after(books, refund(None, "a"))
    assert reply == rules.NotSettled(rules.State.OPEN)
    assert unchanged == books


def test_a_refund_gives_no_budget_back() -> None:
    books, _ = after(settled(), refund(None, "a"))
    assert books.use[rules.TENANT].used_nano == 80


def test_limits_are_replaced_whole_for_the_account_or_a_key() -> None:
    def set_limits(operation_id: str, key_id: str | None, **limits: int) -> rules.SetLimits:
        return rules.SetLimits(
            operation_id=operation_id,
            now_ms=NOON_MS,
            key_id=key_id,
            limits=rules.Limits(**limits),
        )

    books, reply = after(
        rules.Account(),
        set_limits("a", None, concurrency=3, requests_per_minute=9),
        set_limits("b", "k1", daily_budget_nano=5),
        set_limits("c", None, concurrency=4),
    )
    assert reply == rules.Applied(True, 0, rules.Balance(0, 0, 0))
    assert books.limits == {
        "tenant": rules.Limits(concurrency=4),
        "key:k1": rules.Limits(daily_budget_nano=5),
    }
    _, reply = after(books, set_limits("a", None, concurrency=3, requests_per_minute=9))
    assert reply == rules.Applied(False, 0, rules.Balance(0, 0, 0))
    _, reply = after(books, set_limits("b", "k2", daily_budget_nano=5))
    assert reply == rules.OtherContent()


def faulty(**changed: Any) -> list[str]:
    books, _ = after(settled(), reserve("live"))
    return rules.check(replace(books, **changed))


def of_request(request_id: str, **changed: Any) -> dict[str, Any]:
    books, _ = after(settled(), reserve("live"))
    request = replace(books.requests[request_id], **changed)
    return {"requests": {**books.requests, request_id: request}}


def test_check_names_money_from_nowhere() -> None:
    books = settled()
    assert rules.check(books) == []
    more = {**books.balances, "topped_up": books.balances["topped_up"] + 1}
    faults = rules.check(replace(books, balances=more))
    assert "the sub-accounts add up to 1" in faults
    assert any("the journal gives" in fault for fault in faults)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (of_request("live", granted_nano=31), "live requests hold"),
        (of_request("r1", topped_up_nano=21), "requests were charged"),
        (of_request("r1", topped_up_nano=90), "charged more than held"),
        (of_request("r1", content_sha256="00" * 32), "breaks the chain at 1"),
        (of_request("live", day=0), "of day"),
        ({"position": 2}, "does not end with its last receipt"),
        ({"chain": "11" * 32}, "does not end with its last receipt"),
        ({"use": {"tenant": rules.Use(open=3)}}, "counts 3 live holds of 1"),
        ({"journal": ()}, "the journal gives"),
        (
            {"journal": (rules.JournalEntry("grant", "o", 0, {"granted": 5, "hold": -4}),)},
            "does not add up to 0",
        ),
        (
            {"journal": (rules.JournalEntry("grant", "o", 0, {"granted": -5, "hold": 5}),)},
            "leaves something below zero",
        ),
    ],
)
def test_check_names_what_does_not_add_up(changed: dict[str, Any], fault: str) -> None:
    assert any(fault in found for found in faulty(**changed)), faulty(**changed)
