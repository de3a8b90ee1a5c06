"""GetMargin over real journals, and the fleet's hours in a real ledger."""

import asyncio
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import grpc
import pytest

from services.router import margin
from services.router.finish import Completed, Finish, PrefillSite, Timing
from services.router.fleet import Description
from services.router.fleet_hours import FleetHours
from services.router.money import record
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.redis_process import RedisProcess
from tests.router_harness import ADMIN_KEY, BOOK_PATH, MODEL, RouterHarness, bearer
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.billing import BusyPart, Reuse, Unbilled, Usage, issue_receipt, load_price_book
from tidemill.billing import ledger as rules
from tidemill.billing.margin import HOUR_MS, WorkerHour
from tidemill.client import AsyncClient, MarginBy
from tidemill.client.cli import main
from tidemill.errors import InvalidRequest, LedgerUnavailable, TidemillError
from tidemill.rpc import tasks
from tidemill.rpc.options import PUBLIC_MESSAGE_BYTES
from tidemill.rpc.status import from_rpc_error

pytestmark = pytest.mark.redis

NOON = 1_740_657_600_000  # 27 February 2025, 12:00 UTC: nothing else in this ledger is as old
MINUTE_MS = 60_000
HOUR_US = 3_600_000_000
MICRO = 1_000_000
PRICE = 2_000_000_000  # nano-dollars an accelerator-hour
BOOK = load_price_book(BOOK_PATH)
EVERYTHING = list(admin_pb2.MarginDimension.values())[1:]


class Journal:
    """One tenant's requests, as a router would have held and settled them."""

    def __init__(self, accounts: Accounts, tenant_id: str, currency: str) -> None:
        self._accounts = accounts
        self._tenant_id = tenant_id
        self._currency = currency
        self._numbers = itertools.count()

    async def _held(self, at_ms: int) -> tuple[str, int]:
        request_id = f"r{next(self._numbers)}"
        command = rules.TopUp(
            operation_id=f"t-{request_id}", now_ms=at_ms, amount_nano=10**9, note=""
        )
        await self._accounts.top_up(self._tenant_id, command)
        held = await self._accounts.reserve(
            self._tenant_id,
            rules.Reserve(
                request_id=request_id,
                key_id="k",
                body_sha256="0" * 64,
                owner="router",
                now_ms=at_ms,
                lease_ms=1000,
                full_nano=10**9,
                least_nano=10**9,
                prompt_tokens=1,
                max_tokens=1,
                deadline_ms=at_ms + 10**6,
                terms="{}",
            ),
        )
        assert isinstance(held, rules.Held)
        return request_id, held.fence

    async def settled(self, usage: Usage, at_ms: int, busy: Sequence[BusyPart]) -> str:
        request_id, fence = await self._held(at_ms)
        receipt = issue_receipt(
            BOOK,
            request_id=request_id,
            tenant_id=self._tenant_id,
            key_id="k",
            model=MODEL,
            price_model="deepseek-chat",
            currency=self._currency,
            usage=usage,
            admitted_at_ms=at_ms,
            decided_at_ms=at_ms,
            hold_nano=10**9,
        )
        completed = Completed(
            finish=Finish.STOP,
            usage=usage,
            site=PrefillSite(worker_id="w0", in_place=True),
            receipt=receipt,
            seed=1,
            timing=Timing(),
        )
        command = rules.Settle(
            request_id=request_id,
            fence=fence,
            now_ms=at_ms + 5,
            decided_at_ms=at_ms,
            amount_nano=receipt.charge.amount_nano,
            content_sha256=receipt.content_sha256,
            record=record.encode(completed, busy=busy),
            total_tokens=0,
        )
        assert isinstance(await self._accounts.settle(self._tenant_id, command), rules.Posted)
        return request_id

    async def released(self, at_ms: int, busy: Sequence[BusyPart]) -> None:
        request_id, fence = await self._held(at_ms)
        unbilled = record.encode_release(
            Unbilled(server_fault=3), model=MODEL, decided_at_ms=at_ms, busy=busy
        )
        await self._accounts.release(
            self._tenant_id,
            rules.Release(
                request_id=request_id,
                fence=fence,
                now_ms=at_ms,
                unbilled=unbilled,
                reason="WORKER_LOST",
            ),
        )

    async def refunded(self, request_id: str, at_ms: int, amount_nano: int) -> None:
        command = rules.Refund(
            operation_id=f"f-{request_id}",
            now_ms=at_ms,
            request_id=request_id,
            amount_nano=amount_nano,
            note="",
        )
        assert isinstance(await self._accounts.refund(self._tenant_id, command), rules.Applied)


async def journal_of(router: RouterHarness, tenant_id: str, currency: str = "USD") -> Journal:
    await router.make_tenant(tenant_id, currency)
    return Journal(Accounts(router.process.ledger), tenant_id, currency)


def usage_of(hit: int, computed: int, output: int, tier: str = "device") -> Usage:
    return Usage(
        prompt_tokens=hit + computed,
        computed_tokens=computed,
        reused=Reuse(**{tier: hit}),
        completion_tokens=output,
        generated_tokens=output,
    )


def busy(prefill_s: int, decode_s: int) -> list[BusyPart]:
    return [
        BusyPart("w0", "prefill", prefill_s * MICRO, 8),
        BusyPart("w0", "decode", decode_s * MICRO, 8),
    ]


def worker(worker_id: str = "w0", epoch: int = 7) -> Description:
    return Description(
        worker_id=worker_id,
        epoch=epoch,
        address="",
        roles=frozenset(),
        model=MODEL,
        digest=b"",
        kv_format="",
        context_tokens=0,
        vocab_size=0,
        accelerators=8,
    )


async def ask(router: RouterHarness, **fields: Any) -> admin_pb2.GetMarginResponse:
    fields = {"from_ms": NOON, "to_ms": NOON + 2 * HOUR_MS, "currency": "USD", **fields}
    request = admin_pb2.GetMarginRequest(**fields)
    answer: admin_pb2.GetMarginResponse = await router.admin.GetMargin(
        request, metadata=bearer(ADMIN_KEY)
    )
    return answer


async def error_of(router: RouterHarness, **fields: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(router, **fields)
    return from_rpc_error(caught.value)


def total(rows: Sequence[admin_pb2.MarginRow]) -> tuple[int, int, int, int, int]:
    return (
        sum(row.tokens for row in rows),
        sum(row.accelerator_us for row in rows),
        sum(row.cost_nano for row in rows),
        sum(row.revenue_nano for row in rows),
        sum(row.margin_nano for row in rows),
    )


async def test_cost_revenue_and_margin_of_all_that_the_journals_tell(
    router: RouterHarness,
) -> None:
    one, two = await journal_of(router, "margin-a"), await journal_of(router, "margin-b")
    other = await journal_of(router, "margin-c", "CNY")
    charged = await one.settled(usage_of(128, 30, 40), NOON + 5, busy(1, 2))
    await one.settled(usage_of(64, 8, 9, "cache_disk"), NOON + HOUR_MS + 5, busy(2, 3))
    await one.settled(usage_of(0, 8, 9), NOON + 2 * HOUR_MS, busy(5, 5))  # the hour after
    await two.settled(usage_of(0, 70, 1), NOON + HOUR_MS - 1, busy(3, 1))
    await two.released(NOON + 7, busy(1, 1))
    await other.settled(usage_of(0, 5, 5), NOON + 1, busy(4, 4))
    await one.refunded(charged, NOON + HOUR_MS + 9, 1000)

    hours = FleetHours(router.process.ledger, lambda: NOON + 30 * MINUTE_MS)
    hours.saw(worker(), uptime_us=1, prefill_us=0, decode_us=0)
    hours.saw(worker(), uptime_us=1800 * MICRO, prefill_us=10 * MICRO, decode_us=9 * MICRO)
    await hours.write()

    by_tenant = await ask(router, by=["MARGIN_DIMENSION_TENANT"], accelerator_hour_nano=PRICE)
    assert (by_tenant.currency, by_tenant.accelerator_hour_nano) == ("USD", PRICE)
    rows = {row.tenant_id or row.phase: row for row in by_tenant.rows}
    assert set(rows) == {"margin-a", "margin-b", "unattributed", "idle"}
    assert rows["margin-a"].accelerator_us == 8 * 8 * MICRO
    assert rows["margin-b"].accelerator_us == 8 * 6 * MICRO
    # In the first hour it was busy for 19 s; of 9 s the dollars' journals tell, of 8 s the yuans'.
    assert rows["unattributed"].accelerator_us == 8 * 2 * MICRO
    assert rows["idle"].accelerator_us == 8 * (1800 - 19) * MICRO
    assert rows["margin-b"].tokens == 71
    assert rows["margin-b"].cost_nano == pytest.approx(48 * PRICE / 3600, abs=2)
    # USD prices: hit 0.07, miss 0.27, output 1.10 a million
    first = 128 * 70 + 30 * 270 + 40 * 1100
    second = 64 * 70 + 8 * 270 + 9 * 1100
    assert rows["margin-a"].revenue_nano == first + second - 1000
    for row in by_tenant.rows:
        assert row.margin_nano == row.revenue_nano - row.cost_nano

    cells = (await ask(router, by=EVERYTHING, accelerator_hour_nano=PRICE)).rows
    for count in range(5):
        for by in itertools.combinations(EVERYTHING, count):
            answer = await ask(router, by=by, accelerator_hour_nano=PRICE)
            assert total(answer.rows) == total(cells)
    first_hour, second_hour = [
        (
            await ask(
                router,
                by=EVERYTHING,
                accelerator_hour_nano=PRICE,
                from_ms=NOON + number * HOUR_MS,
                to_ms=NOON + (number + 1) * HOUR_MS,
            )
        ).rows
        for number in range(2)
    ]
    assert total([*first_hour, *second_hour]) == total(cells)

    yuan = await ask(router, currency="CNY", accelerator_hour_nano=PRICE)
    work = [row for row in yuan.rows if not row.phase]
    assert [row.accelerator_us for row in work] == [8 * 8 * MICRO]
    assert work[0].tokens == 10


async def test_a_span_must_be_of_whole_hours_and_a_price_known(router: RouterHarness) -> None:
    for fields in (
        {"from_ms": NOON + 1},
        {"to_ms": NOON + MINUTE_MS},
        {"to_ms": NOON},
        {"to_ms": NOON + 401 * 24 * HOUR_MS},
    ):
        error = await error_of(router, accelerator_hour_nano=PRICE, **fields)
        assert error.reason == "INVALID_REQUEST"
    error = await error_of(router)
    assert error.reason == "NO_ACCELERATOR_PRICE"
    for way in ("--accelerator-hour-price", "[router.money] accelerator_hour_nano"):
        assert way in str(error)


async def test_a_currency_in_which_nothing_is_sold_has_no_margin(router: RouterHarness) -> None:
    error = await error_of(router, currency="EUR", accelerator_hour_nano=PRICE)
    assert isinstance(error, InvalidRequest)
    assert error.violations == [("currency", f"must be one of {', '.join(BOOK.currencies)}")]


async def test_more_rows_than_an_answer_holds_are_refused_and_fewer_can_be_asked_for(
    router: RouterHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(margin, "MOST_ROWS", 3)
    from_ms = NOON + 8 * 24 * HOUR_MS
    asked: dict[str, Any] = {"from_ms": from_ms, "to_ms": from_ms + 4 * HOUR_MS}
    asked["accelerator_hour_nano"] = PRICE
    journal = await journal_of(router, "margin-rows")
    for hour in range(4):
        await journal.settled(usage_of(0, 8, 10), from_ms + hour * HOUR_MS, busy=[])
    error = await error_of(router, by=["MARGIN_DIMENSION_HOUR"], **asked)
    assert error.reason == "TOO_MANY_ROWS"
    assert len((await ask(router, **asked)).rows) == 1


def test_the_most_rows_fit_into_one_message() -> None:
    row = admin_pb2.MarginRow(
        tenant_id="t" * 64, model="m" * 128, hour_ms=NOON, phase="p" * 16, tier="t" * 16
    )
    for name in ("tokens", "accelerator_us", "cost_nano", "revenue_nano", "margin_nano"):
        setattr(row, name, 2**63 - 1)
    whole = admin_pb2.GetMarginResponse(rows=[row] * margin.MOST_ROWS, currency="USD")
    assert whole.ByteSize() < PUBLIC_MESSAGE_BYTES


async def test_several_routers_write_an_hour_in_any_order(router: RouterHarness) -> None:
    day = NOON - 24 * HOUR_MS
    clock = [day + 10 * MINUTE_MS]
    one, two = (FleetHours(router.process.ledger, lambda: clock[0]) for _ in range(2))

    def at(hours: FleetHours, minute: int, *, busy_us: int = 0) -> None:
        clock[0] = day + minute * MINUTE_MS
        hours.saw(
            worker(),
            uptime_us=(minute - 5) * 60 * MICRO,  # it started at minute 5
            prefill_us=busy_us,
            decode_us=minute,
        )

    at(one, 10, busy_us=10)
    at(two, 20, busy_us=20)
    at(one, 59, busy_us=59)
    at(two, 58, busy_us=58)
    await two.write()
    await one.write()
    at(two, 30, busy_us=30)  # late, and of no consequence
    at(two, 61, busy_us=61)
    at(one, 90, busy_us=90)
    for hours in (one, two, one):
        await hours.write()
    expected = [
        WorkerHour(
            worker_id="w0",
            model=MODEL,
            hour_ms=day + number * HOUR_MS,
            prefill_us=busy_us,
            decode_us=busy_us,
            uptime_us=uptime_s * MICRO,
            accelerators=8,
        )
        for number, (busy_us, uptime_s) in enumerate([(59, 54 * 60), (31, 31 * 60)])
    ]
    assert await one.read(day, day + 2 * HOUR_MS) == expected
    assert await two.read(day + HOUR_MS, day + 2 * HOUR_MS) == expected[1:]


async def test_what_went_before_the_first_report_of_an_old_worker_is_not_counted(
    router: RouterHarness,
) -> None:
    day = NOON - 48 * HOUR_MS
    clock = [day + 10 * MINUTE_MS]
    hours = FleetHours(router.process.ledger, lambda: clock[0])
    hours.saw(worker(), uptime_us=5 * HOUR_US, prefill_us=100, decode_us=200)
    clock[0] += MINUTE_MS
    hours.saw(worker(), uptime_us=5 * HOUR_US + 60 * MICRO, prefill_us=103, decode_us=204)
    hours.saw(worker("silent"), uptime_us=0, prefill_us=0, decode_us=0)
    await hours.write()
    (hour,) = await hours.read(day, day + HOUR_MS)
    assert (hour.prefill_us, hour.decode_us, hour.uptime_us) == (3, 4, 60 * MICRO)


async def test_what_a_ledger_that_is_away_cannot_take_is_written_later(
    router: RouterHarness, ledger: RedisProcess
) -> None:
    day = NOON - 72 * HOUR_MS
    clock = [day + MINUTE_MS]
    impatient = Ledger(replace(router.process._config.ledger, timeout_s=1.0))
    await impatient.run(lambda redis: redis.ping())
    hours = FleetHours(impatient, lambda: clock[0])
    hours.saw(worker(), uptime_us=10 * MICRO, prefill_us=1, decode_us=2)
    with ledger.frozen(), pytest.raises(LedgerUnavailable):
        await hours.write()
    clock[0] += HOUR_MS
    hours.saw(worker(), uptime_us=10 * MICRO + HOUR_US, prefill_us=11, decode_us=22)
    await hours.write()
    first, second = await hours.read(day, day + 2 * HOUR_MS)
    await impatient.close()
    assert (first.uptime_us, second.uptime_us) == (10 * MICRO, HOUR_US)
    assert (second.prefill_us, second.decode_us) == (10, 20)


async def test_a_router_that_stops_writes_what_it_has_seen(router: RouterHarness) -> None:
    day = NOON - 96 * HOUR_MS
    hours = FleetHours(router.process.ledger, lambda: day + MINUTE_MS)
    hours.saw(worker(), uptime_us=MICRO, prefill_us=1, decode_us=2)
    running = asyncio.create_task(hours.run())
    await asyncio.sleep(0)
    await tasks.end(running)
    (hour,) = await FleetHours(router.process.ledger, lambda: day).read(day, day + HOUR_MS)
    assert hour.uptime_us == MICRO


async def test_the_sdk_and_the_command_show_it(
    router: RouterHarness, capsys: pytest.CaptureFixture[str]
) -> None:
    later = NOON + 30 * 24 * HOUR_MS
    one = await journal_of(router, "margin-cli")
    await one.settled(usage_of(64, 36, 10), later, busy(900, 2700))
    address = router.process.server.address
    async with AsyncClient(address, ADMIN_KEY) as client:
        report = await client.admin.margin(
            later, later + HOUR_MS, by=["tier"], accelerator_hour_nano=PRICE
        )
        with pytest.raises(ValueError, match="colour"):
            await client.admin.margin(0, 1, by=["colour"])
    assert [row.tier for row in report.rows] == ["computed", "device", "output"]
    assert report.total.cost_nano == 8 * PRICE
    assert report.total.margin_nano == report.total.revenue_nano - 8 * PRICE

    span = ["--from", "2025-03-29T12:00", "--to", "2025-03-29T14:00+01:00"]
    connection = ["--address", address, "--api-key", ADMIN_KEY]
    price = ["--accelerator-hour-price", "2"]
    by = ["--by", "tenant,hour"]
    command = ["margin", *span, *connection, *price, *by]
    assert await asyncio.to_thread(main, command) == 0
    shown = capsys.readouterr().out
    assert "margin-cli  2025-03-29 12:00Z" in shown
    assert "8.000000  16.000000000 USD" in shown
    assert "margin is -100.0 % of cost, at 2.000000000 USD an accelerator-hour" in shown
    assert await asyncio.to_thread(main, [*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["total"]["cost_nano"] == sum(row["cost_nano"] for row in shown["rows"])
    assert shown["rows"][0]["hour_ms"] == later
    assert [*MarginBy] == ["tenant", "model", "hour", "phase", "tier"]
