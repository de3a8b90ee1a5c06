"""The operator's side of a run: a tenant with money, and its books once all is over.

Four tell what was used, each by itself: what customers saw on their streams, the receipts they
are given later, the ledger's journal and balance, and the workers' own counters. `differences`
holds them against each other; a run with any has failed.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

from prometheus_client.parser import text_string_to_metric_families

from loadtest.records import Asked
from tidemill.billing import Reuse, Unbilled
from tidemill.billing.verification import verify_documents
from tidemill.client import Client, JournalEntry, Receipt
from tidemill.errors import ConfigError

MONEY_NANO = 1000 * 10**9
_ENDED_S = 60.0
_LOOK_S = 0.2
_METRICS_TIMEOUT_S = 10.0
_FOREVER_MS = 253_402_300_800_000  # the end of the year 9999
_COUNTS = ("prompt_tokens", "cache_hit_tokens", "cache_miss_tokens", "completion_tokens")
_SPLIT = ("computed_tokens", *(f"reused_{tier.name}_tokens" for tier in fields(Reuse)))

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the ledger says of one tenant: charges as (request id, record), and what is gone."""

    charges: Sequence[tuple[str, Record]]
    unbilled: Sequence[Mapping[str, int]]  # of requests that ended without a charge
    spent_nano: int

    @property
    def generated_tokens(self) -> int:
        """Completion tokens that somebody was billed for, or the journal says why not (M4)."""
        billed = sum(int(record["generated_tokens"]) for _, record in self.charges)
        return billed + sum(part[each.name] for part in self.unbilled for each in fields(Unbilled))

    def total(self, name: str) -> int:
        """Sum of one field over all charges."""
        return sum(int(record[name]) for _, record in self.charges)


@dataclass(frozen=True, slots=True)
class Engines:
    """What the workers' counters moved by during the run."""

    generated_tokens: int
    prompt_tokens: Mapping[str, int]  # by the names of _SPLIT


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What a run came to by its books, side by side, and every difference in words: none is due."""

    sides: Mapping[str, Mapping[str, int]]
    differences: Sequence[str]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for side in self.sides.values() for name in side))
        lines = [f"{'':24}" + "".join(f"{side:>16}" for side in self.sides)]
        for name in names:
            cells = (str(side.get(name, "-")) for side in self.sides.values())
            lines.append(f"{name:24}" + "".join(f"{cell:>16}" for cell in cells))
        lines.append(f"the books: {len(self.differences)} differences")
        return "\n".join([*lines, *(f"difference: {each}" for each in self.differences[:20])])


class Books:
    """A tenant made for one run. `metrics` are the workers' metrics pages, all of them or none."""

    def __init__(self, address: str, admin_key: str, metrics: Sequence[str]) -> None:
        self.tenant_id = f"loadtest-{uuid4().hex[:8]}"
        self._metrics = metrics
        self._address = address
        self._operator = Client(address, admin_key)
        admin = self._operator.admin
        admin.create_tenant(self.tenant_id)
        admin.top_up(self.tenant_id, MONEY_NANO, operation_id="loadtest")
        self.api_key = admin.create_key(self.tenant_id, label="loadtest").key
        self._before = self._counters()

    def reconcile(self, asked: Sequence[Asked]) -> Reconciled:
        """Once nothing is held any more. ConfigError if that takes longer than a minute."""
        with self._operator, Client(self._address, self.api_key) as customer:
            self._until_settled()
            statement = list(customer.receipts(0, _FOREVER_MS))
            ledger = self._ledger()
            faults = _verified(customer, statement)
        engines = self._engines() if self._metrics else None
        found = [*faults, *differences(asked, statement, ledger, engines)]
        return Reconciled(sides(asked, statement, ledger, engines), found)

    def _until_settled(self) -> None:
        deadline = time.monotonic() + _ENDED_S
        while any(self._operator.admin.account(self.tenant_id).holds.values()):
            if time.monotonic() > deadline:
                raise ConfigError(f"money of {self.tenant_id} is still held")
            time.sleep(_LOOK_S)

    def _ledger(self) -> Ledger:
        balance = self._operator.admin.account(self.tenant_id).balance
        left = balance.available_nano + balance.held_nano
        return ledger_of(list(self._operator.admin.journal(self.tenant_id)), MONEY_NANO - left)

    def _counters(self) -> Counter[str]:
        return sum((_counters(url) for url in self._metrics), Counter())

    def _engines(self) -> Engines:
        moved = self._counters()
        moved.subtract(self._before)
        split = {name: moved[name] for name in _SPLIT}
        return Engines(moved["generated_tokens"], split)


def ledger_of(entries: Sequence[JournalEntry], spent_nano: int) -> Ledger:
    """From a tenant's whole journal."""
    return Ledger(
        charges=[(each.subject, each.detail) for each in entries if each.kind == "settle"],
        unbilled=[each.detail["unbilled"] for each in entries if each.kind == "release"],
        spent_nano=spent_nano,
    )


def differences(
    asked: Sequence[Asked], statement: Sequence[Receipt], ledger: Ledger, engines: Engines | None
) -> list[str]:
    """All that does not agree, in words."""
    found = compare([receipt for each in asked for receipt in each.receipts], ledger.charges)
    records = dict(ledger.charges)
    ids = {each.request_id for each in asked}
    found += [f"{each} was charged and never asked" for each in records if each not in ids]
    found += [text for each in asked for text in _seen_differently(each, records)]
    stated = Counter((str(each.content["request_id"]), each.content_sha256) for each in statement)
    charged = Counter((each, str(record["content_sha256"])) for each, record in ledger.charges)
    found += [f"{each} is stated and not charged" for each, _ in stated - charged]
    found += [f"{each} is charged and not stated" for each, _ in charged - stated]
    if ledger.spent_nano != (total := ledger.total("amount_nano")):
        found.append(f"the balance fell by {ledger.spent_nano}, the charges are {total}")
    return found + _engine_differences(asked, ledger, engines)


def compare(receipts: Sequence[Receipt], settled: Sequence[tuple[str, Record]]) -> list[str]:
    """In what customers' receipts differ from the journal's charges (request id, record)."""
    times = Counter(request_id for request_id, _ in settled)
    found = [f"{each} was charged {times[each]} times" for each in times if times[each] > 1]
    records = dict(settled)
    for receipt in receipts:
        request_id = str(receipt.content["request_id"])
        record = records.get(request_id)
        if record is None:
            if receipt.state != "priced":
                found.append(f"{request_id} has a {receipt.state} receipt and no charge")
        elif record["content_sha256"] != receipt.content_sha256:
            found.append(f"{request_id} has another receipt than its charge")
    return found


def sides(
    asked: Sequence[Asked], statement: Sequence[Receipt], ledger: Ledger, engines: Engines | None
) -> dict[str, dict[str, int]]:
    """The totals of each, for people. Customers know those counts only whose end they saw."""
    usages = [each.usage for each in asked if each.usage is not None and each.usage.prompt_tokens]
    contents = [each.content for each in statement]
    found = {
        "customers": {
            "requests": len(usages),
            **{name: sum(getattr(usage, name) for usage in usages) for name in _COUNTS},
        },
        "receipts": {
            "requests": len(contents),
            **{name: sum(int(each[name]) for each in contents) for name in _COUNTS},
            "amount_nano": sum(int(each["amount_nano"]) for each in contents),
        },
        "ledger": {
            "requests": len(ledger.charges),
            **{name: ledger.total(name) for name in _COUNTS},
            "amount_nano": ledger.spent_nano,
            **{name: ledger.total(name) for name in _SPLIT},
            "generated_tokens": ledger.generated_tokens,
        },
    }
    if engines is not None:
        generated = {"generated_tokens": engines.generated_tokens}
        found["engines"] = {**engines.prompt_tokens, **generated}
    return found


def _seen_differently(asked: Asked, records: Mapping[str, Record]) -> list[str]:
    """What one customer saw, against its charge."""
    record = records.get(asked.request_id)
    if record is None:
        if asked.received_tokens:
            return [f"{asked.request_id} got {asked.received_tokens} tokens and no charge"]
        return []
    if asked.usage is not None:
        seen = {name: getattr(asked.usage, name) for name in _COUNTS}
        return [
            f"{asked.request_id} saw {count} {name}, was charged {record[name]}"
            for name, count in seen.items()
            if int(record[name]) != count
        ]
    found = []
    if asked.prompt_tokens != int(record["prompt_tokens"]):
        found.append(f"{asked.request_id} has another prompt than its charge")
    if asked.received_tokens > int(record["completion_tokens"]):
        found.append(f"{asked.request_id} got more tokens than it was charged for")
    return found


def _engine_differences(
    asked: Sequence[Asked], ledger: Ledger, engines: Engines | None
) -> list[str]:
    """Every token generated is in the journal; every prompt prefilled too, or was given up.

    A request that ends before its first token costs nothing, and its prompt is in no journal; the
    worker may have finished that prompt. Which ones were is not told, but each is whole: what the
    engines count beyond the journal must be the sum of some of them.
    """
    if engines is None:
        return []
    found = []
    if engines.generated_tokens != ledger.generated_tokens:
        found.append(
            f"engines generated {engines.generated_tokens} tokens, "
            f"the journal has {ledger.generated_tokens}"
        )
    beyond = {name: count - ledger.total(name) for name, count in engines.prompt_tokens.items()}
    found += [
        f"engines count {-count} {name} fewer than the journal"
        for name, count in beyond.items()
        if count < 0
    ]
    total = sum(beyond.values())
    if not found and not (_sums(_given_up(asked, ledger)) >> total) & 1:
        found.append(f"engines prefilled {total} tokens of no prompt that was billed or given up")
    return found


def _given_up(asked: Sequence[Asked], ledger: Ledger) -> list[int]:
    """Prompt tokens of every time that a request was let in and ended without a charge."""
    charged = Counter(request_id for request_id, _ in ledger.charges)
    return [
        each.prompt_tokens
        for each in asked
        for _ in range(each.times_accepted - charged[each.request_id])
    ]


def _sums(numbers: Sequence[int]) -> int:
    """Bit n is set where some of the numbers add up to n."""
    sums = 1
    for number in numbers:
        sums |= sums << number
    return sums


def _verified(customer: Client, statement: Sequence[Receipt]) -> list[str]:
    """M5: every receipt recomputed from the public book, chained without a gap, and signed."""
    digests = {str(each.content["book_digest"]) for each in statement}
    books = {digest: customer.price_book(digest) for digest in digests}
    keys = {key.signing_key_id: key.public_key for key in customer.signing_keys()}
    verdict = verify_documents([each.to_dict() for each in statement], books, keys)
    faults = [f"receipt {each.request_id}: {each.field} {each.problem}" for each in verdict.faults]
    return faults + [f"receipts {each.first} to {each.last} are missing" for each in verdict.gaps]


def _counters(url: str) -> Counter[str]:
    """Tokens by name: generated_tokens and those of _SPLIT."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address of a metrics page")
    with urlopen(url, timeout=_METRICS_TIMEOUT_S) as page:  # noqa: S310 - checked above
        text = page.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix("tidemill_worker_")
        for sample in family.samples:
            if sample.name != f"{family.name}_total":
                continue
            if name in ("generated_tokens", "computed_tokens"):
                found[name] += int(sample.value)
            elif name == "reused_tokens":
                found[f"reused_{sample.labels['tier']}_tokens"] += int(sample.value)
    return found
