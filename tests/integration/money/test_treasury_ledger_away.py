import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.router.finish import Completed
from services.router.money import cashier, spool
from services.router.money.spool import Spool
from tests.money_desk import BOOK, desk, eventually, progress, settle, system_ms
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tidemill.billing import ledger as rules
from tidemill.billing import verify
from tidemill.errors import AlreadyExists, Internal, LedgerUnavailable, Unavailable

pytestmark = pytest.mark.redis

Servers = Callable[..., RedisProcess]


@pytest.fixture
def ledger_server(redis_server: Servers) -> RedisProcess:
    return redis_server(**DURABLE)


async def test_a_bill_that_the_ledger_could_not_take_is_pending_and_settled_once_it_is_back(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(ledger_server, tmp_path) as own:
        await own.top_up(10**9)
        hold = await own.hold("r1")
        ledger_server.kill()
        assert await hold.fund(progress(10)) is None
        completed = await settle(hold, 10)
        assert (completed.pending, completed.chained) == (True, None)
        verify(completed.receipt, BOOK)
        assert own.metric("tidemill_router_spool_depth") == 1
        pending = own.money.treasury.pending("acme", "r1")
        assert pending is not None
        assert (pending.receipt, pending.pending) == (completed.receipt, True)
        again = await own.open("r1")
        assert isinstance(again, Completed)
        assert (again.receipt, again.again) == (completed.receipt, True)
        with pytest.raises(AlreadyExists):
            await own.open("r1", text="another body")
        await eventually(lambda: own.money.readiness is not None)
        ledger_server.start()
        await own.until("r1", rules.State.SETTLED)
        await eventually(lambda: own.metric("tidemill_router_spool_depth") == 0)
        await eventually(lambda: own.money.readiness is None)
        account = await own.account()
        assert account.position == 1
        assert account.balances["revenue"] == completed.receipt.charge.amount_nano
        settled = await own.open("r1")
        assert isinstance(settled, Completed)
        assert settled.receipt == completed.receipt
        assert own.money.treasury.pending("acme", "r1") is None


async def test_nothing_new_is_let_in_while_the_ledger_is_away(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(ledger_server, tmp_path) as own:
        await own.top_up(10**9)
        ledger_server.kill()
        with pytest.raises(LedgerUnavailable) as refused:
            await own.open("r1")
        assert refused.value.retry_after_s
        await eventually(lambda: "ledger" in (own.money.readiness or ""))
        ledger_server.start()
        await eventually(lambda: own.money.readiness is None)
        await own.hold("r2")


async def test_a_write_off_waits_for_the_ledger_too(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(ledger_server, tmp_path) as own:
        await own.top_up(10**9)
        hold = await own.hold("r1")
        ledger_server.kill()
        await hold.release(progress(3).usage, Internal("a worker failed"))
        ledger_server.start()
        await own.until("r1", rules.State.RELEASED)
        assert (await own.account()).balance == rules.Balance(0, 10**9, 0)


async def test_what_a_router_left_in_its_spool_is_settled_before_its_next_life_is_ready(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(ledger_server, tmp_path, router_id="r-1") as own:
        await own.top_up(10**9)
        hold = await own.hold("r1")
        ledger_server.kill()
        completed = await settle(hold, 10)
    ledger_server.start()
    async with desk(ledger_server, tmp_path, router_id="r-1") as own:
        assert own.money.readiness is not None
        await eventually(lambda: own.money.readiness is None)
        assert await own.state("r1") is rules.State.SETTLED
        posted = (await own.account()).requests["r1"].posted
        assert posted is not None
        assert completed.receipt.content_sha256 in posted.record


async def test_a_living_router_settles_what_a_dead_one_left(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(ledger_server, tmp_path, router_id="alive", lease_s=0.3) as own:
        async with desk(ledger_server, tmp_path, router_id="dead", lease_s=30.0) as other:
            await other.top_up(10**9)
            hold = await other.hold("r1")
            ledger_server.kill()
            await settle(hold, 10)
        ledger_server.start()
        await own.until("r1", rules.State.SETTLED)
        await eventually(lambda: not (tmp_path / "spool" / "dead").exists())


async def test_a_bill_that_can_be_put_nowhere_is_kept_and_the_router_is_not_ready(
    ledger_server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cashier, "_STORE_PATIENCE_S", 0.1)

    def full(self: Spool, record: bytes) -> None:
        raise OSError("no space left on device")

    async with desk(ledger_server, tmp_path) as own:
        await own.top_up(10**9)
        hold, other = await own.hold("r1"), await own.hold("r2")
        ledger_server.kill()
        with monkeypatch.context() as patch:
            patch.setattr(spool.Spool, "append", full)
            with pytest.raises(Unavailable) as refused:
                await settle(hold, 10)
            assert refused.value.reason == "SETTLEMENT_UNSTORED"
            assert own.money.treasury.pending("acme", "r1") is not None
            await eventually(lambda: "ledger does not" in (own.money.readiness or ""))
            ledger_server.start()
            await own.until("r1", rules.State.SETTLED)
        assert (await settle(other, 5)).chained is not None
        await eventually(lambda: own.money.readiness is None)
        assert (await own.account()).position == 2


async def test_an_unwritable_spool_fails_readiness_until_it_can_be_written(
    ledger_server: RedisProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([OSError("no space")] * 2)
    append = Spool.append

    def now_and_then(self: Spool, record: bytes) -> None:
        for error in failures:
            raise error
        append(self, record)

    monkeypatch.setattr(spool.Spool, "append", now_and_then)
    async with desk(ledger_server, tmp_path) as own:
        await own.top_up(10**9)
        hold = await own.hold("r1")
        ledger_server.kill()
        settling = asyncio.create_task(settle(hold, 10))
        await eventually(lambda: "written" in (own.money._cashier.readiness or ""))
        assert (await settling).pending
        assert own.money._cashier.readiness is None
        ledger_server.start()
        await own.until("r1", rules.State.SETTLED)


async def test_a_settlement_that_is_cut_short_is_in_the_spool(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(desk(ledger_server, tmp_path, router_id="r-1"))
        await own.top_up(10**9)
        hold = await own.hold("r1")
        with ledger_server.frozen():
            settling = asyncio.create_task(settle(hold, 10))
            await asyncio.sleep(0.1)
            settling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await settling
            assert list((tmp_path / "spool" / "r-1").glob("*.intents"))
        await own.until("r1", rules.State.SETTLED)
        assert (await own.account()).position == 1


async def test_a_slow_ledger_does_not_move_the_instant_that_decides(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with desk(ledger_server, tmp_path, timeout_s=3.0) as own:
        await own.top_up(10**9)
        hold = await own.hold("r1")
        with ledger_server.frozen():
            hold.checkpoint(lambda: progress(1))
            await asyncio.sleep(0.05)
            ended_ms = system_ms()
            settling = asyncio.create_task(settle(hold, 10))
            await asyncio.sleep(0.6)
            frozen_until_ms = system_ms()
        assert ended_ms <= (await settling).receipt.decided_at_ms < frozen_until_ms - 300


async def test_a_ledger_that_restarts_gives_owners_a_lease_before_others_may_take(
    ledger_server: RedisProcess, tmp_path: Path
) -> None:
    async with (
        desk(ledger_server, tmp_path, lease_s=1.5) as own,
        desk(ledger_server, tmp_path, lease_s=1.5) as other,
    ):
        await own.top_up(10**9)
        hold = await own.hold("r1")
        own.money.leases.discard(hold)
        ledger_server.kill()
        await asyncio.sleep(2.0)
        ledger_server.start()
        await eventually(lambda: other.money.readiness is None)
        for _ in range(5):
            with pytest.raises(Exception, match="serving"):
                await other.open("r1")
            await asyncio.sleep(0.1)
        assert (await settle(hold, 10)).chained is not None
