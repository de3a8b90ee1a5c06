"""The SDK's money and the `tidemill` command against the real router and its ledger."""

import asyncio
import csv
import io
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.bank import Bank
from tests.router_harness import ADMIN_KEY, BOOK_PATH, MODEL, OPENING_NANO
from tests.settlements import BOOK, HOUR_MS, NOON_MS
from tidemill import errors
from tidemill.billing import Reuse
from tidemill.billing.verification import verify_documents
from tidemill.client import AsyncClient, Balance, Client, Limits, UsageBy
from tidemill.client.cli import main

pytestmark = pytest.mark.redis

Act = Callable[[Any], Any]
Face = Callable[..., Awaitable[Any]]
FOREVER = NOON_MS + 10**12


@pytest.fixture(params=["sync", "aio"])
def face(request: pytest.FixtureRequest, bank: Bank) -> Face:
    """(act, key) -> what `act` made of a client of either stack, lists of what it iterates."""
    address = bank.router.process.server.address

    async def call(act: Act, key: str = bank.key) -> Any:
        if request.param == "sync":
            return await asyncio.to_thread(_sync, act, address, key)
        async with AsyncClient(address, key) as client:
            found = act(client)
            if hasattr(found, "__aiter__"):
                return [each async for each in found]
            return await found

    return call


def _sync(act: Act, address: str, key: str) -> Any:
    with Client(address, key) as client:
        found = act(client)
        return list(found) if hasattr(found, "__next__") else found


async def tidemill(bank: Bank, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it succeeds, with the tenant's key or the operator's."""
    operators = {"topup", "grant", "refund", "limits", "journal"}
    key = ADMIN_KEY if arguments[0] in operators else bank.key
    connection = ("--address", bank.router.process.server.address, "--api-key", key)
    status = await asyncio.to_thread(main, [*arguments, *connection])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out


async def test_balances_limits_and_operations_are_plain_values(face: Face, bank: Bank) -> None:
    tenant = bank.tenant_id
    made = await face(
        lambda client: client.admin.top_up(tenant, 5, operation_id="a", note="x"), ADMIN_KEY
    )
    assert (made.operation_id, made.applied, made.amount_nano) == ("a", True, 5)
    given = await face(lambda client: client.admin.grant(tenant, 7), ADMIN_KEY)
    assert given.applied
    assert given.operation_id
    assert await face(
        lambda client: client.admin.set_limits(tenant, Limits(concurrency=2)), ADMIN_KEY
    )
    balance: Balance = await face(lambda client: client.balance())
    assert (balance.granted_nano, balance.topped_up_nano) == (7, OPENING_NANO + 5)
    assert balance.available_nano == OPENING_NANO + 12
    assert balance.available == "1000.000000012 USD"
    (state,) = balance.limits
    assert (state.scope, state.limit, state.value, state.remaining) == (
        "tenant",
        "concurrency",
        2,
        2,
    )
    assert state.resets_at_ms is None
    account = await face(lambda client: client.admin.account(tenant), ADMIN_KEY)
    assert account.limits == Limits(concurrency=2)
    assert account.balance.available_nano == balance.available_nano


async def test_all_pages_of_usage_receipts_and_journal_are_read(
    face: Face, bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidemill.client.account_calls.PAGE_SIZE", 2)
    settled = [await bank.settle(at_ms=NOON_MS + 24 * day * HOUR_MS) for day in range(5)]
    receipts = await face(lambda client: client.receipts(0, FOREVER))
    assert [receipt.position for receipt in receipts] == [1, 2, 3, 4, 5]
    rows = await face(lambda client: client.usage(0, FOREVER, by=[UsageBy.DAY, "model"]))
    assert [(row.day, row.model, row.requests) for row in rows] == [
        (f"2025-06-{16 + day}", "tiny", 1) for day in range(5)
    ]
    assert sum(row.amount_nano for row in rows) == sum(each.amount_nano for each in receipts)
    usage = settled[0].usage
    assert rows[0].reuse == Reuse(
        device=usage.reused.device,
        host=usage.reused.host,
        cache_ram=usage.reused.cache_ram,
        cache_disk=usage.reused.cache_disk,
        peer=usage.reused.peer,
    )
    entries = await face(lambda client: client.admin.journal(bank.tenant_id), ADMIN_KEY)
    assert [entry.kind for entry in entries] == ["top_up", *["reserve", "settle"] * 5]
    assert entries[2].detail["request_id"] == settled[0].receipt.request_id


async def test_a_receipt_verifies_with_the_book_and_the_keys_that_are_published(
    face: Face, bank: Bank
) -> None:
    await bank.settle(request_id="one")
    refunded = await face(
        lambda client: client.admin.refund(bank.tenant_id, "one", amount_nano=3), ADMIN_KEY
    )
    assert refunded.amount_nano == 3
    found = await face(lambda client: client.receipt("one"))
    assert [refund.amount_nano for refund in found.refunds] == [3]
    book = await face(lambda client: client.price_book(found.receipt.content["book_digest"]))
    assert book == BOOK == await face(lambda client: client.price_book())
    found.receipt.verify(book)
    keys = await face(lambda client: client.signing_keys())
    public = {key.signing_key_id: key.public_key for key in keys}
    verdict = verify_documents([found.receipt.to_dict()], {book.digest: book}, public)
    assert not verdict.faults
    with pytest.raises(errors.NotFound):
        await face(lambda client: client.receipt("two"))


async def test_a_quote_takes_what_a_request_takes(face: Face) -> None:
    told = await face(
        lambda client: client.quote(
            "x" * 100, model=MODEL, max_tokens=9, expected_completion_tokens=4
        )
    )
    assert (told.prompt_tokens, told.expected_hit_tokens, told.max_tokens) == (100, 0, 9)
    prices = told.now.prices
    assert told.now.expected_nano == (100 * prices.miss + 4 * prices.output + 500) // 1000
    assert told.book_digest == BOOK.digest
    asked = {"role": "user", "content": "hi"}
    chat = await face(lambda client: client.quote(messages=[asked], model=MODEL))
    assert chat.prompt_tokens == len("user:hi;")
    with pytest.raises(TypeError):
        await face(lambda client: client.quote("p", messages=[asked], model=MODEL))


async def test_the_command_moves_money_and_shows_it(
    bank: Bank, capsys: pytest.CaptureFixture[str]
) -> None:
    tenant = bank.tenant_id
    said = await tidemill(bank, capsys, "topup", tenant, "12.5", "--operation-id", "a")
    assert said == "12.500000000 USD paid in; 1012.500000000 USD to spend\n"
    said = await tidemill(bank, capsys, "topup", tenant, "12.5", "--operation-id", "a")
    assert said.startswith("12.500000000 USD paid in, by this operation, before; 1012.5")
    said = await tidemill(bank, capsys, "grant", tenant, "0.000000001")
    assert said.startswith("0.000000001 USD granted; ")
    settled = await bank.settle(request_id="one")
    amount = settled.receipt.charge.amount_nano
    said = await tidemill(bank, capsys, "refund", tenant, "one", "0.000000002", "--note", "sorry")
    assert said.startswith("0.000000002 USD given back; ")
    said = await tidemill(bank, capsys, "refund", tenant, "one", "--json")
    assert json.loads(said)["amount_nano"] == amount - 2
    await tidemill(
        bank, capsys, "limits", "set", tenant, "--daily-budget", "2", "--concurrency", "3"
    )
    said = await tidemill(bank, capsys, "limits", "show", tenant)
    assert "tenant  daily_budget_nano  2.000000000 USD" in said
    assert "holds: none" in said
    said = await tidemill(bank, capsys, "balance")
    assert said.startswith("1012.500000001 USD to spend (0.000000001 USD granted, ")
    assert "concurrency" in said
    lines = (await tidemill(bank, capsys, "journal", tenant)).splitlines()
    assert [line.split("\t")[2] for line in lines] == [
        "top_up", "top_up", "grant", "reserve", "settle", "refund", "refund",
    ]  # fmt: skip
    said = await tidemill(bank, capsys, "receipts", "show", "one")
    assert said.startswith(f"0.{amount:09d} USD (")
    assert "0.000000002 USD given back" in said
    assert "sorry" in said


async def test_an_export_verifies_by_the_command_alone(
    bank: Bank, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for day in range(3):
        await bank.settle(at_ms=NOON_MS + 24 * day * HOUR_MS)
    path = tmp_path / "june.jsonl"
    span = ("--from", "2025-06-17", "--to", "2025-06-18T12:00:01+00:00")
    assert await tidemill(bank, capsys, "receipts", "export", *span, "--out", str(path)) == ""
    assert len(path.read_text().splitlines()) == 2
    key = (await tidemill(bank, capsys, "receipts", "keys")).split()[1]
    book = tmp_path / "book.json"
    book.write_text(await tidemill(bank, capsys, "receipts", "book"))
    for file in (BOOK_PATH, book):
        verify = ["receipts", "verify", str(path), "--book", str(file), "--public-key", key]
        assert main(verify) == 0
        said = capsys.readouterr().out
        assert said == "2 receipts, all verify; signatures checked\n"
    table = await tidemill(bank, capsys, "receipts", "export", *span, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(table)))
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{name: str(value) for name, value in each.items()} for each in documents]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("limits", "set", "acme", "--concurrency", "0"), ""),
        (("quote", "hi", "--expect", "-1"), ""),
        (("receipts", "book", "zz"), ""),
        (("usage", "--from", "yesterday"), "CONFIG_ERROR: --from is no instant"),
        (("usage", "--to", "noon"), "CONFIG_ERROR: --to is no instant"),
        (("margin", "--to", "noon"), "CONFIG_ERROR: --to is no instant"),
        (("usage", "--zone", "Mars/Olympus", "--from", "2025-01-01"), "CONFIG_ERROR: --zone is"),
        (("usage", "--from", "9999-12-31T23:59:59.999999-12:00"), ""),
        (("receipts", "export", "--from", "1900-01-01"), ""),
    ],
)
async def test_what_cannot_be_is_one_clear_line(
    bank: Bank, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], named: str
) -> None:
    address = bank.router.process.server.address
    connection = ("--address", address, "--api-key", bank.key)
    assert await asyncio.to_thread(main, [*arguments, *connection]) in {1, 2}
    said = capsys.readouterr().err
    assert said.startswith(f"error: {named}")
    assert said.count("\n") == 1


async def test_usage_and_quotes_are_tables_and_json(
    bank: Bank, capsys: pytest.CaptureFixture[str]
) -> None:
    await bank.settle()
    await bank.settle(at_ms=NOON_MS + 5 * HOUR_MS)
    said = await tidemill(bank, capsys, "usage", "--by", "day,window")
    lines = said.splitlines()
    assert lines[0].split()[:6] == ["day", "window", "requests", "hit", "miss", "output"]
    assert [line.split()[:3] for line in lines[1:]] == [
        ["2025-06-16", "off-peak", "1"],
        ["2025-06-16", "standard", "1"],
    ]
    said = await tidemill(bank, capsys, "usage", "--from", "2025-06-16T15:00Z", "--json")
    assert [row["requests"] for row in json.loads(said)["rows"]] == [1]
    said = await tidemill(bank, capsys, "quote", "hello", "--max-tokens", "3")
    assert said.startswith("prompt 5 tokens, 0 of them likely hits; at most 3 tokens of output\n")
    said = await tidemill(bank, capsys, "quote", "hello", "--chat", "--expect", "2", "--json")
    assert json.loads(said)["prompt_tokens"] == len("user:hello;")
