"""Accounts on a real Redis: many at once, reading back, clusters, scripts that were forgotten."""

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from services.router.config import LedgerConfig
from services.router.money import accounts as accounts_module
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.ledger_commands import LEASE_MS, NOON_MS, orphan, release, reserve, send, settle, sha256
from tests.redis_process import RedisProcess
from tidemill.billing import ledger as rules

pytestmark = pytest.mark.redis

SHA256 = Path(accounts_module.__file__).parent / "sha256.lua"


async def top_up(accounts: Accounts, tenant_id: str, amount: int) -> None:
    command = rules.TopUp(operation_id="first", now_ms=NOON_MS, amount_nano=amount)
    assert isinstance(await accounts.top_up(tenant_id, command), rules.Applied)


async def in_order(accounts: Accounts, tenant_id: str) -> rules.Account:
    stored = await accounts.read(tenant_id)
    assert rules.check(stored) == []
    return stored


async def leases(accounts: Accounts, tenant_id: str) -> dict[str, int]:
    """Until when each live hold is its owner's."""
    stored = await accounts.read(tenant_id)
    return {each.request_id: each.lease_until_ms for each in stored.requests.values() if each.live}


async def test_of_200_requests_at_once_a_balance_for_20_holds_exactly_20(
    accounts: Accounts,
) -> None:
    await top_up(accounts, "crowd", 20 * 100 + 9)
    seen: list[rules.Balance] = []

    async def watch() -> None:
        while True:
            seen.append(await accounts.balance("crowd"))

    watching = asyncio.create_task(watch())
    replies = await asyncio.gather(
        *(accounts.reserve("crowd", reserve(f"r{number}")) for number in range(200))
    )
    watching.cancel()
    assert Counter(type(reply) for reply in replies) == {rules.Held: 20, rules.Refused: 180}
    assert {reply.reason for reply in replies if isinstance(reply, rules.Refused)} == {
        rules.Reason.INSUFFICIENT_BALANCE
    }
    assert all(balance.topped_up_nano >= 0 and balance.held_nano <= 2000 for balance in seen)
    stored = await in_order(accounts, "crowd")
    assert stored.balance == rules.Balance(0, 9, 2000)
    held = [number for number, reply in enumerate(replies) if isinstance(reply, rules.Held)]
    await asyncio.gather(
        *(accounts.settle("crowd", settle(f"r{number}", amount_nano=100)) for number in held)
    )
    stored = await in_order(accounts, "crowd")
    assert stored.balance == rules.Balance(0, 9, 0)
    assert stored.position == 20


async def test_a_request_settled_by_many_at_once_is_charged_once(accounts: Accounts) -> None:
    await top_up(accounts, "once", 1000)
    await accounts.reserve("once", reserve())
    replies = await asyncio.gather(
        *(accounts.settle("once", settle(amount_nano=number)) for number in range(1, 31))
    )
    posted = [reply for reply in replies if isinstance(reply, rules.Posted)]
    assert sorted(reply.duplicate for reply in posted) == [False] + [True] * 29
    assert len({(reply.chain, reply.topped_up_nano, reply.record) for reply in posted}) == 1
    await in_order(accounts, "once")


async def test_scripts_that_the_server_forgot_are_loaded_again(
    accounts: Accounts, ledger: Ledger
) -> None:
    await top_up(accounts, "flushed", 1000)

    async def forget() -> None:
        await ledger.run(lambda redis: redis.script_flush())

    await forget()
    assert isinstance(await accounts.reserve("flushed", reserve()), rules.Held)
    await forget()
    assert isinstance(await accounts.settle("flushed", settle()), rules.Posted)
    await in_order(accounts, "flushed")


async def test_chains_are_sha_256(ledger: Ledger) -> None:
    many = """
    local links = {}
    for i = 1, #ARGV, 2 do links[#links + 1] = chain_of(ARGV[i], ARGV[i + 1]) end
    return links"""
    edges = [bytes(32), b"\xff" * 32, b"\x80" + bytes(31), bytes(31) + b"\x01"]
    pairs = [(previous, content) for previous in edges for content in edges]
    pairs += [(os.urandom(32), os.urandom(32)) for _ in range(4000)]
    source = SHA256.read_text() + many
    for start in range(0, len(pairs), 500):
        some = pairs[start : start + 500]
        found = await ledger.run(
            lambda redis, some=some: redis.eval(
                source, 0, *(part for pair in some for part in pair)
            )  # type: ignore[misc]
        )
        assert found == [hashlib.sha256(previous + content).digest() for previous, content in some]


async def test_two_routers_chain_one_accounts_receipts_in_turn(ledger: Ledger) -> None:
    routers = (Accounts(ledger), Accounts(ledger))  # each remembers where it last saw the end
    await top_up(routers[0], "chained", 10_000)
    for number, router in enumerate([0, 0, 1, 0, 1, 1, 0]):
        await routers[router].reserve("chained", reserve(f"r{number}"))
        posted = await routers[router].settle("chained", settle(f"r{number}"))
        assert isinstance(posted, rules.Posted)
        assert posted.position == number + 1
    await in_order(routers[0], "chained")


async def test_every_command_keeps_to_its_accounts_slot_of_a_cluster(
    redis_server: Callable[..., RedisProcess], free_port: Callable[[], int]
) -> None:
    server = redis_server(cluster_enabled="yes", cluster_port=str(free_port()))
    redis: Any = Redis.from_url(server.url)
    await redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    async with asyncio.timeout(60):
        while b"cluster_state:ok" not in await redis.execute_command(  # noqa: ASYNC110 - another process
            "CLUSTER", "INFO"
        ):
            await asyncio.sleep(0.05)
    await redis.aclose()
    ledger = Ledger(LedgerConfig(url=server.url, pepper_file=Path(), admin_key_file=Path()))
    accounts = Accounts(ledger)
    late = NOON_MS + LEASE_MS
    limits = rules.Limits(tokens_per_minute=10_000)
    model = rules.Account()
    for command in (
        rules.TopUp(operation_id="a", now_ms=NOON_MS, amount_nano=1000),
        rules.Grant(operation_id="b", now_ms=NOON_MS, amount_nano=10),
        rules.SetLimits(operation_id="c", now_ms=NOON_MS, key_id="k1", limits=limits),
        reserve("a"),
        reserve("b"),
        rules.Extend(request_id="a", fence=1, now_ms=NOON_MS, add_nano=5, checkpoint="{}"),
        rules.Checkpoint(request_id="a", fence=1, now_ms=NOON_MS, attempts=1, checkpoint="{}"),
        rules.Renew(
            owner="router-a", now_ms=NOON_MS, lease_ms=LEASE_MS, holds=(("a", 1), ("b", 1))
        ),
        orphan("a", now_ms=late),
        settle("a"),
        release("b"),
        rules.Refund(operation_id="d", now_ms=NOON_MS, request_id="a"),
    ):
        model, expected = rules.apply(model, command)
        assert await send(accounts, "slots", command) == expected
    stored = await in_order(accounts, "slots")
    assert stored.requests == model.requests
    await ledger.close()


async def test_what_was_written_reads_back(accounts: Accounts) -> None:
    await top_up(accounts, "reader", 1000)
    assert await accounts.request("reader", "r1") is None
    assert await accounts.balance("nobody") == rules.Balance(0, 0, 0)
    assert await accounts.limits("nobody") == {rules.TENANT: (rules.Limits(), rules.Use())}
    limits = rules.Limits(concurrency=7, daily_budget_nano=10**6)
    await accounts.set_limits(
        "reader", rules.SetLimits(operation_id="l", now_ms=NOON_MS, key_id="k1", limits=limits)
    )
    await accounts.reserve("reader", reserve("r1"))
    await accounts.reserve("reader", reserve("r2", now_ms=NOON_MS + 1))
    await accounts.reserve("reader", reserve("r3", now_ms=NOON_MS + 2))
    late = NOON_MS + LEASE_MS
    await accounts.orphan("reader", orphan("r1", now_ms=late))
    assert await accounts.holds("reader") == {rules.State.OPEN: 2, rules.State.ORPHAN: 1}
    assert await leases(accounts, "reader") == {
        "r1": late + LEASE_MS,
        "r2": late + 1,
        "r3": late + 2,
    }
    by_now = await accounts.late_requests(late + 1, limit=9)
    assert [each for each in by_now if each[0] == "reader"] == [("reader", "r2")]
    one_each = await accounts.late_requests(late + LEASE_MS, limit=1)
    assert [each for each in one_each if each[0] == "reader"] == [("reader", "r2")]
    scopes = await accounts.limits("reader")
    assert scopes["key:k1"][0] == limits
    assert scopes["key:k1"][1].open == 3
    assert scopes[rules.TENANT][1].used_nano == 300
    assert "reader" in await accounts.tenants()
    assert await accounts.position("reader") == 0
    assert await accounts.get_book("ab" * 32) is None
    await accounts.put_book("ab" * 32, b'{"id":"x"}')
    assert await accounts.get_book("ab" * 32) == b'{"id":"x"}'


async def test_receipts_come_in_pages_of_a_half_open_span(accounts: Accounts) -> None:
    await top_up(accounts, "pages", 10_000)
    decided = {f"r{number:02}": NOON_MS + number // 3 for number in range(20)}
    for request_id, decided_at_ms in decided.items():
        await accounts.reserve("pages", reserve(request_id))
        await accounts.settle("pages", settle(request_id, decided_at_ms=decided_at_ms))
    span = range(NOON_MS + 1, NOON_MS + 5)
    expected = [request_id for request_id, at_ms in decided.items() if at_ms in span]
    for limit in (1, 2, 3, 4, 100):
        found: list[str] = []
        after = None
        while True:
            page, after = await accounts.receipts(
                "pages", from_ms=span.start, to_ms=span.stop, after=after, limit=limit
            )
            assert len(page) <= limit
            found += [request.request_id for request in page]
            if after is None:
                break
        assert found == expected
    assert await accounts.position("pages") == 20
    last, _ = await accounts.receipts(
        "pages", from_ms=NOON_MS + 6, to_ms=NOON_MS + 7, after=None, limit=9
    )
    assert [request.posted.record for request in last if request.posted] == [
        '{"receipt":"r18"}',
        '{"receipt":"r19"}',
    ]


async def test_the_journal_comes_in_pages_that_add_up_to_the_balances(accounts: Accounts) -> None:
    await top_up(accounts, "paged", 1000)
    for number in range(5):  # a clock that runs backwards
        await accounts.reserve("paged", reserve(f"r{number}", now_ms=NOON_MS - number))
    found: list[tuple[str, rules.JournalEntry]] = []
    while page := await accounts.journal("paged", after=found[-1][0] if found else "", limit=2):
        assert len(page) <= 2
        found += page
    assert [entry.subject for _, entry in found] == ["first", "r0", "r1", "r2", "r3", "r4"]
    assert [entry.at_ms - NOON_MS for _, entry in found] == [0, 0, -1, -2, -3, -4]
    total = {name: sum(entry.postings.get(name, 0) for _, entry in found) for name in ("hold",)}
    assert total["hold"] == (await accounts.balance("paged")).held_nano


async def test_amounts_are_exact_up_to_the_largest(accounts: Accounts) -> None:
    most = rules.MAX_NANO
    await top_up(accounts, "rich", most)
    reply = await accounts.reserve("rich", reserve(full_nano=most - 1, least_nano=most - 1))
    assert isinstance(reply, rules.Held)
    assert reply.held_nano == most - 1
    assert await accounts.balance("rich") == rules.Balance(0, 1, most - 1)
    posted = await accounts.settle("rich", settle(amount_nano=most - 2))
    assert isinstance(posted, rules.Posted)
    assert posted.topped_up_nano == most - 2
    stored = await in_order(accounts, "rich")
    assert stored.balances["revenue"] == most - 2
    again = rules.TopUp(operation_id="again", now_ms=NOON_MS, amount_nano=most)
    assert await accounts.top_up("rich", again) == rules.TooMuch(most - 2)


async def test_many_holds_are_renewed_in_several_scripts(accounts: Accounts) -> None:
    await top_up(accounts, "many", 10**6)
    ids = [f"r{number}" for number in range(450)]
    await asyncio.gather(*(accounts.reserve("many", reserve(request_id)) for request_id in ids))
    await accounts.settle("many", settle("r7"))
    renew = rules.Renew(
        owner="router-a",
        now_ms=NOON_MS + 1000,
        lease_ms=LEASE_MS,
        holds=tuple((request_id, 1) for request_id in ids),
    )
    assert await accounts.renew("many", renew) == rules.Renewed(("r7",))
    held = await leases(accounts, "many")
    assert held == dict.fromkeys(set(ids) - {"r7"}, NOON_MS + 1000 + LEASE_MS)


async def test_a_settlement_outlives_the_death_of_the_server(
    redis_server: Callable[..., RedisProcess],
) -> None:
    server = redis_server(appendonly="yes", appendfsync="always")
    ledger = Ledger(LedgerConfig(url=server.url, pepper_file=Path(), admin_key_file=Path()))
    accounts = Accounts(ledger)
    await top_up(accounts, "survivor", 1000)
    before = await ledger.up_since_ms(NOON_MS)
    assert await ledger.up_since_ms(NOON_MS + 5000) == before == NOON_MS
    await accounts.reserve("survivor", reserve())
    posted = await accounts.settle("survivor", settle(content_sha256=sha256("x")))
    server.kill()
    server.start()
    assert await ledger.up_since_ms(NOON_MS + 9000) == NOON_MS + 9000
    stored = await in_order(accounts, "survivor")
    assert stored.requests["r1"].posted == posted
    assert await accounts.reserve("survivor", reserve()) is not None
    await ledger.close()
