"""Double entry: how an entry moves money, what its detail says, and what must always add up."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from tidemill.billing.chain import FIRST_CHAIN, next_chain
from tidemill.billing.ledger_account import (
    ADJUSTMENT,
    GRANTED,
    HOLD,
    PAID_IN,
    REVENUE,
    SUB_ACCOUNTS,
    TENANT,
    TOPPED_UP,
    Account,
    JournalEntry,
    key_scope,
)
from tidemill.billing.ledger_commands import MAX_NANO, Grant, Refund, Release, TopUp
from tidemill.billing.ledger_limits import used_of


def posted(account: Account, entry: JournalEntry) -> Account:
    """`account` with `entry`, less its zeros, in its journal and its balances."""
    postings = {name: nano for name, nano in entry.postings.items() if nano}
    assert sum(postings.values()) == 0, postings
    balances = {name: nano + postings.get(name, 0) for name, nano in account.balances.items()}
    journal = (*account.journal, replace(entry, postings=postings))
    return replace(account, balances=balances, journal=journal)


def release_detail(command: Release) -> str:
    """What the journal says of a release."""
    return f'{{"reason":{json.dumps(command.reason)},"unbilled":{command.unbilled}}}'


def operation_detail(command: TopUp | Grant | Refund) -> str:
    """What the journal says of an operation; of a refund also the request."""
    if isinstance(command, Refund):
        return _json({"note": command.note, "request_id": command.request_id})
    return _json({"note": command.note})


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def check(account: Account) -> list[str]:
    """What is wrong with the books, in words: nothing, whatever was done (M1 to M4)."""
    return [
        *_balance_faults(account),
        *_journal_faults(account),
        *_use_faults(account),
        *_chain_faults(account),
    ]


def _balance_faults(account: Account) -> Iterator[str]:
    balances = account.balances
    if sum(balances.values()):
        yield f"the sub-accounts add up to {sum(balances.values())}"
    for name in (GRANTED, TOPPED_UP, HOLD, REVENUE):
        if balances[name] < 0:
            yield f"{name} is below zero: {balances[name]}"
    for name in (ADJUSTMENT, PAID_IN):
        if balances[name] > 0:
            yield f"{name} is above zero: {balances[name]}"
    if balances[GRANTED] + balances[TOPPED_UP] + balances[HOLD] > MAX_NANO:
        yield "more than MAX_NANO is kept"
    requests = account.requests.values()
    held = sum(request.amount_nano for request in requests if request.live)
    if balances[HOLD] != held:
        yield f"hold is {balances[HOLD]}, live requests hold {held}"
    charged = sum(r.amount_nano - r.refunded_nano for r in requests if r.posted)
    if balances[REVENUE] != charged:
        yield f"revenue is {balances[REVENUE]}, requests were charged {charged}"
    for request in requests:
        if request.posted and not 0 <= request.amount_nano <= request.posted.held_nano:
            yield f"{request.request_id} was charged more than held"
        if not 0 <= request.refunded_nano <= request.amount_nano:
            yield f"{request.request_id} was given back more than charged"


def _journal_faults(account: Account) -> Iterator[str]:
    balances = dict.fromkeys(SUB_ACCOUNTS, 0)
    for entry in account.journal:
        if sum(entry.postings.values()):
            yield f"{entry.kind} {entry.subject} does not add up to 0: {entry.postings}"
        for name, nano in entry.postings.items():
            balances[name] += nano
        if min(balances[GRANTED], balances[TOPPED_UP], balances[HOLD], balances[REVENUE]) < 0:
            yield f"{entry.kind} {entry.subject} leaves something below zero: {balances}"
    if balances != dict(account.balances):
        yield f"the journal gives {balances}, not {dict(account.balances)}"
    settled = Counter(entry.subject for entry in account.journal if entry.kind == "settle")
    if settled != Counter(r.request_id for r in account.requests.values() if r.posted):
        yield "settlements in the journal and settled requests differ"


def _use_faults(account: Account) -> Iterator[str]:
    for scope, use in account.use.items():
        mine = [r for r in account.requests.values() if scope in {TENANT, key_scope(r.key_id)}]
        live = sum(request.live for request in mine)
        if use.open != live:
            yield f"{scope} counts {use.open} live holds of {live}"
        for day in (use.day, use.day - 1):
            used = sum(request.amount_nano for request in mine if request.day == day)
            if used_of(use, day) != used:
                yield f"{scope} counts {used_of(use, day)} of day {day}, requests {used}"


def _chain_faults(account: Account) -> Iterator[str]:
    settled = [(r.posted, r) for r in account.requests.values() if r.posted]
    chain = FIRST_CHAIN
    for position, (link, request) in enumerate(sorted(settled, key=lambda s: s[0].position), 1):
        expected = next_chain(chain, request.content_sha256)
        if (link.position, link.previous_chain, link.chain) != (position, chain, expected):
            yield f"{request.request_id} breaks the chain at {position}"
        chain = link.chain
    if (account.position, account.chain) != (len(settled), chain):
        yield "the account's chain does not end with its last receipt"
