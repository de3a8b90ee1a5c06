"""BillingService over the wire: what a tenant reads is what the ledger holds."""

import asyncio
import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import pytest

from tests.bank import Bank
from tests.redis_process import RedisProcess
from tests.router_harness import ADMIN_KEY, bearer, listen
from tests.router_harness import MODEL as TINY
from tests.scripted_worker import ScriptedWorker, Talk
from tests.settlements import BOOK, HOUR_MS, NOON_MS, some_usage, totals_of
from tidemill.api.billing.v1 import account_pb2, receipt_pb2
from tidemill.api.billing.v1 import billing_service_pb2 as pb
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing import decode_book, parse_price_book
from tidemill.billing.verification import verify_documents
from tidemill.client import convert

pytestmark = pytest.mark.redis

KEY, MODEL, DAY, WINDOW = (
    pb.USAGE_DIMENSION_KEY,
    pb.USAGE_DIMENSION_MODEL,
    pb.USAGE_DIMENSION_DAY,
    pb.USAGE_DIMENSION_WINDOW,
)


async def settle_many(bank: Bank, count: int, seed: int = 1) -> None:
    """Over three days, two keys, two models, both windows, some at the very same millisecond."""
    rng = random.Random(seed)
    for _ in range(count):
        await bank.settle(
            at_ms=NOON_MS + rng.randrange(24) * 3 * HOUR_MS,
            key_id=rng.choice(["k1", "k2"]),
            model=rng.choice(["tiny", "large"]),
            usage=some_usage(rng),
        )


def total(rows: list[Any]) -> Counter[str]:
    """Sums of usage rows."""
    sums: Counter[str] = Counter()
    for row in rows:
        for name in ("device", "host", "cache_ram", "cache_disk", "peer"):
            sums[name] += getattr(row.reused, name)
        for field, value in row.ListFields():
            if isinstance(value, int):
                sums[field.name] += value
    return +sums


def day_of(receipt: receipt_pb2.Receipt, zone: str = "UTC") -> str:
    at = datetime.fromtimestamp(receipt.decided_at_ms / 1000, UTC)
    return at.astimezone(ZoneInfo(zone)).date().isoformat()


async def test_rows_of_all_pages_add_up_to_the_receipts(bank: Bank) -> None:
    await settle_many(bank, 60)
    span: dict[str, Any] = {"from_ms": NOON_MS + 5 * HOUR_MS, "to_ms": NOON_MS + 60 * HOUR_MS}
    receipts = await bank.receipts(**span)
    assert 0 < len(receipts) < 60
    expected = sum((Counter(totals_of(receipt)) for receipt in receipts), Counter())
    value: dict[Any, Callable[[receipt_pb2.Receipt], str]] = {
        KEY: lambda receipt: receipt.key_id,
        MODEL: lambda receipt: receipt.model,
        DAY: lambda receipt: day_of(receipt, "Asia/Shanghai"),
        WINDOW: lambda receipt: receipt.window,
    }
    columns = {KEY: "key_id", MODEL: "model", DAY: "day", WINDOW: "window"}
    for length in range(5):
        for by in itertools.permutations(value, length):
            request = pb.ListUsageRequest(by=by, zone="Asia/Shanghai", **span)
            pages = await bank.pages("ListUsage", request, size=3)
            assert all(len(page) == 3 for page in pages[:-1])
            rows = [row for page in pages for row in page]
            assert total(rows) == +expected
            groups: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
            for receipt in receipts:
                groups[tuple(value[each](receipt) for each in by)].update(totals_of(receipt))
            keys = [tuple(getattr(row, columns[each]) for each in by) for row in rows]
            assert keys == sorted(groups)
            assert [total([row]) for row in rows] == [+groups[key] for key in keys]
            assert {row.currency for row in rows} == {"USD"}


async def test_usage_of_nothing_has_no_rows(bank: Bank) -> None:
    answer = await bank.call("ListUsage", pb.ListUsageRequest(to_ms=NOON_MS))
    assert not answer.rows
    assert not answer.next_page_token


async def test_a_span_is_half_open(bank: Bank) -> None:
    for at_ms in (NOON_MS - 1, NOON_MS, NOON_MS + 1, NOON_MS + 2):
        await bank.settle(at_ms=at_ms, request_id=f"at-{at_ms - NOON_MS}")
    found = await bank.receipts(from_ms=NOON_MS, to_ms=NOON_MS + 2)
    assert [receipt.request_id for receipt in found] == ["at-0", "at-1"]
    usage = await bank.call("ListUsage", pb.ListUsageRequest(from_ms=NOON_MS, to_ms=NOON_MS + 2))
    assert [row.requests for row in usage.rows] == [2]
    assert not await bank.receipts(from_ms=NOON_MS, to_ms=NOON_MS)


async def test_days_are_those_of_the_zone(bank: Bank) -> None:
    await bank.settle(at_ms=NOON_MS)  # 20:00 in Shanghai, 05:00 in Los Angeles
    await bank.settle(at_ms=NOON_MS + 4 * HOUR_MS)  # midnight in Shanghai
    days = {}
    for zone in ("Asia/Shanghai", "America/Los_Angeles", None):
        request = pb.ListUsageRequest(to_ms=NOON_MS + 10**9, by=[DAY], zone=zone)
        rows = (await bank.call("ListUsage", request)).rows
        days[zone] = [(row.day, row.requests) for row in rows]
    assert days["Asia/Shanghai"] == [("2025-06-16", 1), ("2025-06-17", 1)]
    assert days["America/Los_Angeles"] == days[None] == [("2025-06-16", 2)]


async def test_one_key_or_model_is_told_alone(bank: Bank) -> None:
    await settle_many(bank, 30)
    every = await bank.receipts()
    questions: list[dict[str, Any]] = [
        {"key_id": "k1"},
        {"model": "large"},
        {"key_id": "k2", "model": "tiny"},
    ]
    for fields in questions:
        wanted = [
            receipt
            for receipt in every
            if all(getattr(receipt, name) == value for name, value in fields.items())
        ]
        assert 0 < len(wanted) < 30
        assert await bank.receipts(**fields) == wanted
        request = pb.ListUsageRequest(to_ms=NOON_MS + 10**12, **fields)
        (row,) = (await bank.call("ListUsage", request)).rows
        assert (row.requests, row.amount_nano) == (
            len(wanted),
            sum(receipt.amount_nano for receipt in wanted),
        )


async def test_pages_see_the_account_as_it_was_at_the_first(bank: Bank) -> None:
    for hour in range(4):
        await bank.settle(at_ms=NOON_MS + 24 * hour * HOUR_MS)
    usage = pb.ListUsageRequest(to_ms=NOON_MS + 10**12, by=[DAY], page_size=2)
    first = await bank.call("ListUsage", usage)
    listing = pb.ListReceiptsRequest(to_ms=NOON_MS + 10**12, page_size=2)
    read = await bank.call("ListReceipts", listing)
    await bank.settle(at_ms=NOON_MS)  # late, into days that were told
    await bank.settle(at_ms=NOON_MS + 49 * HOUR_MS)  # and into those to come
    usage.page_token = first.next_page_token
    second = await bank.call("ListUsage", usage)
    assert [row.requests for row in (*first.rows, *second.rows)] == [1, 1, 1, 1]
    assert not second.next_page_token
    listing.page_token = read.next_page_token
    rest = await bank.call("ListReceipts", listing)
    assert [each.position for each in (*read.receipts, *rest.receipts)] == [1, 2, 3, 4]
    assert len(await bank.receipts()) == 6


async def test_receipts_of_one_instant_are_paged_without_loss(bank: Bank) -> None:
    for _ in range(7):
        await bank.settle(at_ms=NOON_MS)
    pages = await bank.pages("ListReceipts", pb.ListReceiptsRequest(to_ms=NOON_MS + 1), size=2)
    assert [len(page) for page in pages] == [2, 2, 2, 1]
    assert len({receipt.request_id for page in pages for receipt in page}) == 7


@pytest.mark.parametrize("token", ["x", "e30", "bnVsbA", "//", "W10" * 9, "\0", "eyJxIjoxfQ"])
async def test_a_page_token_that_was_never_given_is_refused(bank: Bank, token: str) -> None:
    for method, request in (
        ("ListUsage", pb.ListUsageRequest(page_token=token)),
        ("ListReceipts", pb.ListReceiptsRequest(page_token=token)),
    ):
        error = await bank.refused(method, request)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert [field for field, _ in error.violations] == ["page_token"]  # type: ignore[attr-defined]


async def test_a_page_token_of_another_question_is_refused(bank: Bank) -> None:
    for _ in range(3):
        await bank.settle()
    request = pb.ListReceiptsRequest(to_ms=NOON_MS + 1, page_size=2)
    token = (await bank.call("ListReceipts", request)).next_page_token
    assert token
    for changed in ({"to_ms": NOON_MS + 2}, {"key_id": "k1"}, {"from_ms": 1}):
        other = pb.ListReceiptsRequest(**({"to_ms": NOON_MS + 1, "page_token": token} | changed))
        assert (await bank.refused("ListReceipts", other)).reason == "INVALID_REQUEST"
    usage = pb.ListUsageRequest(to_ms=NOON_MS + 1, page_token=token)
    assert (await bank.refused("ListUsage", usage)).reason == "INVALID_REQUEST"
    request.page_token, request.page_size = token, 1  # the size may change
    assert len((await bank.call("ListReceipts", request)).receipts) == 1


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ListUsage", pb.ListUsageRequest(from_ms=2, to_ms=1), "to_ms"),
        ("ListReceipts", pb.ListReceiptsRequest(from_ms=2, to_ms=1), "to_ms"),
        ("ListUsage", pb.ListUsageRequest(zone="Mars/Olympus"), "zone"),
        ("ListUsage", pb.ListUsageRequest(zone="/etc/passwd"), "zone"),
        ("ListUsage", pb.ListUsageRequest(zone="../UTC"), "zone"),
        ("ListUsage", pb.ListUsageRequest(by=[KEY, KEY]), "by"),
        ("ListUsage", pb.ListUsageRequest(by=[pb.USAGE_DIMENSION_UNSPECIFIED]), "by[0]"),
        ("ListUsage", pb.ListUsageRequest(page_size=0), "page_size"),
        ("ListReceipts", pb.ListReceiptsRequest(from_ms=-1), "from_ms"),
        ("GetReceipt", pb.GetReceiptRequest(request_id="../x"), "request_id"),
        ("GetPriceBook", pb.GetPriceBookRequest(digest=b"x" * 33), "digest"),
        ("Quote", pb.QuoteRequest(), "request"),
    ],
)
async def test_what_cannot_be_asked_is_named(
    bank: Bank, method: str, request_: Any, field: str
) -> None:
    error = await bank.refused(method, request_)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [path for path, _ in error.violations] == [field]  # type: ignore[attr-defined]


async def test_what_is_listed_verifies_offline_with_the_routers_key(bank: Bank) -> None:
    await settle_many(bank, 12)
    listed = [convert.receipt(receipt).to_dict() for receipt in await bank.receipts()]
    keys = (await bank.call("ListSigningKeys", pb.ListSigningKeysRequest())).keys
    book = await bank.call("GetPriceBook", pb.GetPriceBookRequest())
    books = {book.digest.hex(): decode_book(book.canonical_json, digest=book.digest.hex())}
    public = {key.signing_key_id: key.public_key for key in keys}
    verdict = verify_documents(listed, books, public)
    assert (verdict.num_receipts, verdict.faults, verdict.gaps) == (12, (), [])
    assert verdict.signatures_checked
    assert {receipt["state"] for receipt in listed} == {"settled"}


async def test_a_receipt_is_the_same_however_it_is_read(bank: Bank) -> None:
    settled = await bank.settle(request_id="one")
    answer = await bank.call("GetReceipt", pb.GetReceiptRequest(request_id="one"))
    assert [answer.receipt] == await bank.receipts()
    assert answer.receipt.content_sha256.hex() == settled.receipt.content_sha256
    assert answer.receipt.chain.hex() == settled.chained.chain  # type: ignore[union-attr]
    assert answer.receipt.granted_nano + answer.receipt.topped_up_nano == answer.receipt.amount_nano
    assert not answer.refunds


async def test_a_receipt_that_waits_for_the_ledger_is_pending_and_verifies(
    bank: Bank, decode: ScriptedWorker, ledger: RedisProcess
) -> None:
    gate = asyncio.Event()

    async def held_up(talk: Talk) -> None:
        await talk.prefill_done(70)
        await gate.wait()
        await talk.tokens([71, 72])
        await talk.final("LENGTH")

    decode.scripts = [held_up]
    keys = (await bank.call("ListSigningKeys", pb.ListSigningKeysRequest())).keys
    public = {key.signing_key_id: key.public_key for key in keys}
    request = router_pb2.GenerateRequest(
        request_id="late",
        model=TINY,
        prompt="hello",
        sampling=sampling_pb2.Sampling(max_tokens=3),
    )
    call = bank.router.call(request, key=bank.key)
    while not (await call.read()).HasField("chunk"):
        pass
    asked = pb.GetReceiptRequest(request_id="late")
    running = await bank.refused("GetReceipt", asked)
    assert (running.reason, running.metadata) == ("RECEIPT_NOT_FOUND", {"state": "OPEN"})
    ledger.kill()
    gate.set()
    bill = (await listen(call)).completed.receipt
    found = (await bank.call("GetReceipt", asked)).receipt
    assert found == bill
    assert found.state == receipt_pb2.RECEIPT_STATE_PENDING
    document = convert.receipt(found).to_dict()
    assert not verify_documents([document], {BOOK.digest: BOOK}, public).faults
    unknown = await bank.refused("GetReceipt", pb.GetReceiptRequest(request_id="other"))
    assert unknown.code is grpc.StatusCode.UNAVAILABLE
    ledger.start()
    pending = bank.router.process.money.treasury.pending
    await bank.router.until(lambda: pending(bank.tenant_id, "late") is None)
    settled = (await bank.call("GetReceipt", asked)).receipt
    assert settled.state == receipt_pb2.RECEIPT_STATE_SETTLED
    assert settled.content_sha256 == found.content_sha256
    assert [settled] == await bank.receipts(to_ms=settled.decided_at_ms + 1)


async def test_nobody_reads_the_receipts_of_another(bank: Bank) -> None:
    await bank.settle(request_id="mine")
    stranger = Bank(
        bank.router, bank.settlements, await bank.router.make_tenant(f"{bank.tenant_id}-x")
    )
    error = await stranger.refused("GetReceipt", pb.GetReceiptRequest(request_id="mine"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "RECEIPT_NOT_FOUND")
    assert not await stranger.receipts()
    answer = await stranger.call("ListUsage", pb.ListUsageRequest(to_ms=NOON_MS + 10**12))
    assert not answer.rows


async def test_refunds_stand_beside_the_receipt_and_in_usage(bank: Bank) -> None:
    settled = await bank.settle(request_id="one")
    amount = settled.receipt.charge.amount_nano
    for number, part in enumerate((7, amount - 7)):
        refund = admin_pb2.RefundRequest(
            tenant_id=bank.tenant_id,
            operation_id=f"refund-{number}",
            request_id="one",
            amount_nano=part,
            note="sorry",
        )
        await bank.admin("Refund", refund)
    answer = await bank.call("GetReceipt", pb.GetReceiptRequest(request_id="one"))
    told = [(each.operation_id, each.amount_nano, each.note) for each in answer.refunds]
    assert told == [("refund-0", 7, "sorry"), ("refund-1", amount - 7, "sorry")]
    assert answer.receipt.amount_nano == amount
    request = pb.ListUsageRequest(to_ms=NOON_MS + 1)
    (row,) = (await bank.call("ListUsage", request)).rows
    assert (row.amount_nano, row.refunded_nano) == (amount, amount)


async def test_a_refund_made_between_pages_is_not_seen_on_the_later_ones(bank: Bank) -> None:
    await bank.settle(request_id="one", at_ms=NOON_MS)
    await bank.settle(request_id="two", at_ms=NOON_MS + 24 * HOUR_MS)
    request = pb.ListUsageRequest(to_ms=NOON_MS + 10**12, by=[DAY], page_size=1)
    first = await bank.call("ListUsage", request)
    await asyncio.sleep(0.01)
    refund = admin_pb2.RefundRequest(
        tenant_id=bank.tenant_id, operation_id="late", request_id="two"
    )
    await bank.admin("Refund", refund)
    request.page_token = first.next_page_token
    (row,) = (await bank.call("ListUsage", request)).rows
    assert (row.requests, row.refunded_nano) == (1, 0)


async def test_the_balance_tells_money_and_what_limits_leave(bank: Bank) -> None:
    for key_id, limits in (
        (None, account_pb2.Limits(requests_per_minute=60, daily_budget_nano=10**9)),
        (bank.key_id, account_pb2.Limits(concurrency=3, tokens_per_minute=1000)),
    ):
        request = admin_pb2.SetLimitsRequest(
            tenant_id=bank.tenant_id, operation_id=f"set-{key_id}", limits=limits, key_id=key_id
        )
        assert (await bank.admin("SetLimits", request)).applied
    settled = await bank.settle(key_id=bank.key_id)
    answer = await bank.call("GetBalance", pb.GetBalanceRequest())
    amount = settled.receipt.charge.amount_nano
    assert answer.balance == account_pb2.Balance(
        currency="USD", topped_up_nano=1000 * 10**9 - amount
    )
    told = {(each.scope, each.limit): each for each in answer.limits}
    assert {key: each.value for key, each in told.items()} == {
        ("tenant", "requests_per_minute"): 60,
        ("tenant", "daily_budget_nano"): 10**9,
        ("key", "tokens_per_minute"): 1000,
        ("key", "concurrency"): 3,
    }
    assert told["key", "concurrency"].remaining == 3
    assert told["tenant", "daily_budget_nano"].resets_at_ms % (24 * HOUR_MS) == 0


async def test_a_price_book_is_found_by_its_digest(bank: Bank) -> None:
    present = await bank.call("GetPriceBook", pb.GetPriceBookRequest())
    assert present.digest.hex() == BOOK.digest
    assert (present.book_id, present.version) == (BOOK.id, BOOK.version)
    named = await bank.call("GetPriceBook", pb.GetPriceBookRequest(digest=present.digest))
    assert named == present
    text = BOOK_TEXT.replace("version = 1", "version = 7")
    older = parse_price_book(text, source="older")
    request = pb.GetPriceBookRequest(digest=bytes.fromhex(older.digest))
    error = await bank.refused("GetPriceBook", request)
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "PRICE_BOOK_NOT_FOUND")
    await bank.settlements.accounts.put_book(older.digest, older.canonical_bytes)
    assert (await bank.call("GetPriceBook", request)).version == 7


BOOK_TEXT = (Path(__file__).parents[3] / "prices" / "deepseek-2025-02.toml").read_text()


async def test_every_method_refuses_a_caller_without_credentials(bank: Bank) -> None:
    service = pb.DESCRIPTOR.services_by_name["BillingService"]
    for method in service.methods:
        for metadata in ((), bearer("tm_abc.def"), bearer(ADMIN_KEY)):
            call: Any = bank.router.channel.unary_unary(f"/{service.full_name}/{method.name}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
