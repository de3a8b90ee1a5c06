"""What docs/operations.md says of copies of the ledger and of trimming its journal."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from services.router.config import LedgerConfig
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.ledger_commands import NOON_MS, reserve, settle, sha256
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tidemill.billing import ledger as rules

pytestmark = pytest.mark.redis

TENANT = "copied"
ENOUGH_NANO = 10**6
AMOUNT_NANO = 30


def ledger_at(server: RedisProcess) -> Ledger:
    return Ledger(LedgerConfig(url=server.url, pepper_file=Path(), admin_key_file=Path()))


async def sell(accounts: Accounts, name: str, count: int, sold: list[str]) -> None:
    for number in range(count):
        request_id = f"{name}-{number}"
        assert isinstance(await accounts.reserve(TENANT, reserve(request_id)), rules.Held)
        charge = settle(request_id, content_sha256=sha256(request_id))
        assert isinstance(await accounts.settle(TENANT, charge), rules.Posted)
        sold.append(request_id)


async def test_a_copy_of_the_files_of_a_busy_ledger_is_a_whole_ledger_of_that_moment(
    redis_server: Callable[..., RedisProcess], free_port: Callable[[], int], tmp_path: Path
) -> None:
    original = redis_server(**DURABLE)
    ledger = ledger_at(original)
    accounts = Accounts(ledger)
    opening = rules.TopUp(operation_id="first", now_ms=NOON_MS, amount_nano=ENOUGH_NANO)
    await accounts.top_up(TENANT, opening)
    sold: list[str] = []
    selling = [asyncio.create_task(sell(accounts, f"s{n}", 60, sold)) for n in range(8)]
    while len(sold) < 100:  # noqa: ASYNC110 - a test may look twice
        await asyncio.sleep(0.005)
    before = list(sold)
    copy = tmp_path / "copy"
    await asyncio.to_thread(shutil.copytree, original.directory, copy)
    after = len(sold)
    await asyncio.gather(*selling)
    assert after < len(sold)  # it was busy throughout
    await ledger.close()

    restored = RedisProcess(copy, port=free_port(), settings=DURABLE)
    restored.start()
    try:
        ledger = ledger_at(restored)
        await ledger.check_settings()
        accounts = Accounts(ledger)
        account = await accounts.read(TENANT)
        assert rules.check(account) == []
        settled = {name for name, each in account.requests.items() if each.posted is not None}
        assert set(before) <= settled
        assert account.balances["revenue"] == AMOUNT_NANO * len(settled)
        # What it knows is charged once; what it forgot would be charged anew.
        again = await accounts.settle(TENANT, settle(before[0], content_sha256=sha256(before[0])))
        assert isinstance(again, rules.Posted)
        assert again.duplicate
        await ledger.close()
    finally:
        restored.stop()


async def test_a_trimmed_journal_changes_no_balance_and_takes_further_entries(
    redis_server: Callable[..., RedisProcess],
) -> None:
    ledger = ledger_at(redis_server(**DURABLE))
    accounts = Accounts(ledger)
    opening = rules.TopUp(operation_id="first", now_ms=NOON_MS, amount_nano=ENOUGH_NANO)
    await accounts.top_up(TENANT, opening)
    await sell(accounts, "early", 5, [])
    before = await accounts.balance(TENANT)
    trimmed = await ledger.run(
        lambda redis: redis.xtrim(f"tm:{{{TENANT}}}:journal", minid="9" * 15)
    )
    assert trimmed >= 10
    assert await accounts.balance(TENANT) == before
    await sell(accounts, "late", 3, [])
    known = await accounts.request(TENANT, "early-0")
    assert known is not None
    assert known.posted is not None
    later = await accounts.balance(TENANT)
    assert before.topped_up_nano - later.topped_up_nano == 3 * AMOUNT_NANO
    await ledger.close()
