"""A run whose books agree, and every way in which one count of them can be wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from loadtest.books import Engines, Ledger, Reconciled, compare, differences, sides
from loadtest.records import Asked, Behaviour, End
from tidemill.client import Receipt, Usage

SPLIT = {
    "computed_tokens": 36,
    "reused_device_tokens": 64,
    "reused_host_tokens": 0,
    "reused_cache_ram_tokens": 0,
    "reused_cache_disk_tokens": 0,
    "reused_peer_tokens": 0,
}
BILL = {
    "prompt_tokens": 100,
    "cache_hit_tokens": 64,
    "cache_miss_tokens": 36,
    "completion_tokens": 7,
    "generated_tokens": 9,
    "amount_nano": 50,
    **SPLIT,
}


@dataclass
class Run:
    """What all four sides say."""

    asked: list[Asked]
    statement: list[Receipt]
    ledger: Ledger
    engines: Engines

    def differences(self) -> list[str]:
        return differences(self.asked, self.statement, self.ledger, self.engines)


def receipt(request_id: str, state: str = "settled", content_sha256: str = "aa") -> Receipt:
    content: dict[str, Any] = {"request_id": request_id, **BILL}
    return Receipt(content=content, state=state, content_sha256=content_sha256)


def charge(request_id: str, **changes: Any) -> tuple[str, dict[str, Any]]:
    return request_id, {"content_sha256": "aa", **BILL, **changes}


def asked(request_id: str, end: End = End.WHOLE, *, received: int = 7) -> Asked:
    usage = Usage(prompt_tokens=100, cache_hit_tokens=64, cache_miss_tokens=36, completion_tokens=7)
    return Asked(
        request_id,
        Behaviour.READS,
        due_s=0.0,
        sent_s=0.0,
        end=end,
        prompt_tokens=100,
        times_accepted=1,
        received_tokens=received,
        usage=usage if end is End.WHOLE else None,
        receipts=[receipt(request_id)] if end is End.WHOLE else [],
    )


def true_run() -> Run:
    """One read to its end, one hung up after three tokens, one gone before its charge."""
    return Run(
        asked=[
            asked("read"),
            asked("left", End.HUNG_UP, received=3),
            asked("gone", End.HUNG_UP, received=0),
        ],
        statement=[receipt("read"), receipt("left")],
        ledger=Ledger(
            charges=[charge("read"), charge("left")],
            unbilled=[{"overrun": 1, "failover_redo": 0, "lost": 2, "server_fault": 0}],
            spent_nano=100,
        ),
        engines=Engines(21, {name: 2 * count for name, count in SPLIT.items()}),
    )


def test_a_true_run_has_no_differences() -> None:
    run = true_run()
    assert run.differences() == []
    totals = sides(run.asked, run.statement, run.ledger, run.engines)
    assert totals["customers"]["completion_tokens"] == 7
    assert totals["receipts"]["completion_tokens"] == totals["ledger"]["completion_tokens"] == 14
    assert totals["ledger"]["generated_tokens"] == totals["engines"]["generated_tokens"] == 21
    assert "the books: 0 differences" in str(Reconciled(totals, []))


def engines_generated(run: Run) -> None:
    run.engines = replace(run.engines, generated_tokens=22)


def prefilled(run: Run, **more: int) -> None:
    before = run.engines.prompt_tokens
    changed = {name: before[name] + count for name, count in more.items()}
    run.engines = replace(run.engines, prompt_tokens={**before, **changed})


def engines_computed(run: Run) -> None:
    prefilled(run, computed_tokens=1)


def engines_computed_less(run: Run) -> None:
    prefilled(run, computed_tokens=-1)


def engines_reused_elsewhere(run: Run) -> None:
    prefilled(run, reused_device_tokens=-64, reused_peer_tokens=64)


def unbilled_left_out(run: Run) -> None:
    run.ledger = replace(run.ledger, unbilled=[])


def balance(run: Run) -> None:
    run.ledger = replace(run.ledger, spent_nano=101)


def charged_twice(run: Run) -> None:
    run.ledger = replace(run.ledger, charges=[*run.ledger.charges, charge("read")])


def charge_of_nobody(run: Run) -> None:
    run.ledger = replace(run.ledger, charges=[*run.ledger.charges, charge("stranger")])


def charge_lost(run: Run) -> None:
    run.ledger = replace(run.ledger, charges=run.ledger.charges[1:])


def charge_of_more(run: Run) -> None:
    changed = [charge("read", completion_tokens=8), charge("left")]
    run.ledger = replace(run.ledger, charges=changed)


def statement_short(run: Run) -> None:
    run.statement = run.statement[:1]


def statement_altered(run: Run) -> None:
    run.statement = [receipt("read"), receipt("left", content_sha256="bb")]


def customer_s_receipt(run: Run) -> None:
    run.asked[0].receipts = [receipt("read"), receipt("read", content_sha256="bb")]


def customer_s_hits(run: Run) -> None:
    assert run.asked[0].usage is not None
    run.asked[0].usage = replace(run.asked[0].usage, cache_hit_tokens=63)


def customer_got_more(run: Run) -> None:
    run.asked[1].received_tokens = 8


def customer_got_it_free(run: Run) -> None:
    run.asked[2].received_tokens = 1


def another_prompt(run: Run) -> None:
    run.asked[1].prompt_tokens = 99


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (engines_generated, "engines generated 22 tokens, the journal has 21"),
        (engines_computed, "engines prefilled 1 tokens of no prompt that was billed or given up"),
        (engines_computed_less, "engines count 1 computed_tokens fewer than the journal"),
        (
            engines_reused_elsewhere,
            "engines count 64 reused_device_tokens fewer than the journal",
        ),
        (unbilled_left_out, "engines generated 21 tokens, the journal has 18"),
        (balance, "the balance fell by 101, the charges are 100"),
        (charged_twice, "read was charged 2 times"),
        (charge_of_nobody, "stranger was charged and never asked"),
        (charge_lost, "read has a settled receipt and no charge"),
        (charge_of_more, "read saw 7 completion_tokens, was charged 8"),
        (statement_short, "left is charged and not stated"),
        (statement_altered, "left is stated and not charged"),
        (customer_s_receipt, "read has another receipt than its charge"),
        (customer_s_hits, "read saw 63 cache_hit_tokens, was charged 64"),
        (customer_got_more, "left got more tokens than it was charged for"),
        (customer_got_it_free, "gone got 1 tokens and no charge"),
        (another_prompt, "left has another prompt than its charge"),
    ],
)
def test_one_tampered_count_is_a_difference(tamper: Callable[[Run], None], told: str) -> None:
    run = true_run()
    tamper(run)
    assert told in run.differences()


def test_a_prompt_that_was_given_up_may_have_been_prefilled_as_a_whole() -> None:
    run = true_run()
    prefilled(run, computed_tokens=36, reused_host_tokens=64)
    assert run.differences() == []  # "gone" was let in, and had a prompt of a hundred tokens
    run.asked[2].times_accepted = 0
    assert run.differences() == [
        "engines prefilled 100 tokens of no prompt that was billed or given up"
    ]


def test_a_request_asked_again_was_let_in_once_for_its_charge() -> None:
    run = true_run()
    run.asked[0].times_accepted = 2  # hung up before the first token, then read
    prefilled(run, computed_tokens=200)
    assert run.differences() == []
    prefilled(run, computed_tokens=100)
    assert len(run.differences()) == 1


def test_a_receipt_that_cost_nothing_needs_no_charge() -> None:
    assert compare([receipt("r1", "priced")], []) == []
    assert compare([receipt("r1", "pending")], []) == ["r1 has a pending receipt and no charge"]
