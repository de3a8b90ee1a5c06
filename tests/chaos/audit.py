"""The ledger read behind everybody's back, and held against customers and engines."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from functools import partial

from services.router.config import LedgerConfig
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.chaos.customers import Customers, Outcome
from tests.chaos.fleet import LEASE_S, Fleet
from tests.stack_harness import BOOK_PATH, eventually
from tidemill.billing import Unbilled, load_price_book
from tidemill.billing import ledger as rules
from tidemill.billing.verification import verify_documents
from tidemill.errors import LedgerUnavailable

_FOREVER_MS = 253_402_300_800_000  # the last instant that a call may name
_LOOK_S = 0.02
_QUIET_S = 20 * LEASE_S
_DONE = {rules.State.SETTLED, rules.State.RELEASED}
_GENERATED = "tidemill_worker_generated_tokens_total"


class Auditor:
    """Reads accounts of `tenants` in the ledger Redis itself."""

    def __init__(self, fleet: Fleet, accounts: Accounts, tenants: Sequence[str]) -> None:
        self._fleet = fleet
        self._accounts = accounts
        self._tenants = tenants
        self.looks = 0

    async def watch(self) -> None:
        """Look at all balances over and over, until cancelled: none is ever below zero (M3)."""
        while True:
            for tenant in self._tenants:
                try:
                    balance = await self._accounts.balance(tenant)
                except LedgerUnavailable:
                    continue
                self.looks += 1
                parts = (balance.granted_nano, balance.topped_up_nano, balance.held_nano)
                assert min(parts) >= 0, f"{tenant} is below zero: {balance}"
            await asyncio.sleep(_LOOK_S)

    async def until_quiet(self, workers: Sequence[str]) -> None:
        """Wait until no money is held, nothing is spooled and none of the workers has work."""
        await eventually(partial(self._is_quiet, workers), _QUIET_S)

    async def _is_quiet(self, workers: Sequence[str]) -> bool:
        held = [sum((await self._accounts.holds(tenant)).values()) for tenant in self._tenants]
        spooled = list(self._fleet.stack.plan.state.spool.glob("*/*.intents"))
        return not any(held) and not spooled and await self._fleet.has_no_work(workers)

    async def read(self) -> list[rules.Account]:
        """All accounts."""
        return [await self._accounts.read(tenant) for tenant in self._tenants]


@asynccontextmanager
async def auditing(fleet: Fleet, tenants: Sequence[str]) -> AsyncIterator[Auditor]:
    """An auditor with a connection of its own, watching."""
    state = fleet.stack.plan.state
    config = LedgerConfig(
        url=fleet.ledger_url,
        pepper_file=state.secrets / "pepper",
        admin_key_file=state.secrets / "admin.key",
    )
    ledger = Ledger(config)
    auditor = Auditor(fleet, Accounts(ledger), tenants)
    watch = asyncio.create_task(auditor.watch())
    try:
        yield auditor
        if watch.done():
            watch.result()
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await ledger.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """What a round's accounts say in the end."""

    accounts: Sequence[rules.Account]

    def check(self) -> None:
        """Every request has ended, at most one charge each, and the books balance."""
        for account in self.accounts:
            assert rules.check(account) == []
            open_ = [each for each in account.requests.values() if each.state not in _DONE]
            assert not open_, f"still open: {open_}"
            charges = Counter(each.subject for each in account.journal if each.kind == "settle")
            double = [subject for subject, times in charges.items() if times > 1]
            assert not double, f"charged twice: {double}"

    def entries(self, kind: str) -> Iterable[rules.JournalEntry]:
        """Of all accounts."""
        return (entry for each in self.accounts for entry in each.journal if entry.kind == kind)

    @property
    def charges(self) -> dict[str, rules.Request]:
        """Settled requests by id."""
        requests = [each for account in self.accounts for each in account.requests.values()]
        return {each.request_id: each for each in requests if each.posted is not None}

    def tokens_touched_by(self, worker_id: str) -> int:
        """Completion tokens of all requests that this worker may have generated some of.

        It may have died between a request's last token and its Final: then nobody's decode compute
        is on record.
        """
        records = [json.loads(entry.detail) for entry in self.entries("settle")]
        unbilled = [json.loads(entry.detail)["unbilled"] for entry in self.entries("release")]
        touched = [
            int(each["generated_tokens"])
            for each in records
            if each["attempts"] > 1
            or worker_id in {part["worker_id"] for part in each["busy"]}
            or not any(part["phase"] == "decode" for part in each["busy"])
        ]
        return sum(touched) + sum(map(_unbilled_tokens, unbilled))

    @property
    def generated_tokens(self) -> int:
        """Completion tokens that anybody was billed for, or the journal says why not (M4)."""
        settled = [json.loads(entry.detail) for entry in self.entries("settle")]
        released = [json.loads(entry.detail)["unbilled"] for entry in self.entries("release")]
        return sum(int(each["generated_tokens"]) for each in settled) + sum(
            map(_unbilled_tokens, released)
        )


def _unbilled_tokens(unbilled: Mapping[str, int]) -> int:
    return sum(unbilled[each.name] for each in fields(Unbilled))


def check_receipts(books: Books, outcomes: Sequence[Outcome]) -> None:
    """No answer is without its charge, and each receipt is the one that the ledger has."""
    charges = books.charges
    for outcome in outcomes:
        completion = outcome.completion
        if completion is None or completion.receipt is None or not completion.usage.prompt_tokens:
            continue
        request = charges.get(outcome.order.request_id)
        assert request is not None, f"lost: {outcome}"
        assert request.posted is not None
        kept = json.loads(request.posted.record)
        assert kept["content_sha256"] == completion.receipt.content_sha256, outcome
        assert request.amount_nano == completion.receipt.amount_nano


async def check_statements(books: Books, customers: Customers, router: str) -> None:
    """What customers are told later: each charge once, recomputed, chained and signed (M5)."""
    book = load_price_book(BOOK_PATH)
    documents = []
    keys: Mapping[str, bytes] = {}
    for tenant in customers.tenants:
        async with customers.anew(tenant, router) as client:
            keys = {key.signing_key_id: key.public_key for key in await client.signing_keys()}
            documents += [each.to_dict() async for each in client.receipts(0, _FOREVER_MS)]
    verdict = verify_documents(documents, {book.digest: book}, keys)
    assert not verdict.faults
    assert not verdict.gaps
    stated = {str(each["request_id"]): each["content_sha256"] for each in documents}
    kept = {
        request_id: json.loads(request.posted.record)["content_sha256"]
        for request_id, request in books.charges.items()
        if request.posted is not None
    }
    assert stated == kept


async def generated_by(fleet: Fleet, workers: Sequence[str]) -> int:
    """What these workers' own counters say."""
    metrics = [await fleet.stack.metrics(name) for name in workers]
    return int(sum(each.total(_GENERATED) for each in metrics))
