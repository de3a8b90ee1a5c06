"""The Redis processes of a local stack: users, rights, durability."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio
from redis.exceptions import AuthenticationError, NoPermissionError

from services.stack.launcher import STORES_TIMEOUT_S
from services.stack.plan import Plan
from services.stack.processes import Supervisor
from services.stack.state import StateDirectory

pytestmark = pytest.mark.redis


@asynccontextmanager
async def stores(directory: Path) -> AsyncIterator[Plan]:
    state = StateDirectory(directory)
    with state.held():
        state.prepare(empty=False)
        plan = Plan(state, directory)
        supervisor = Supervisor(
            state.logs, directory=directory, environ={}, say=lambda _: None, started=lambda _: None
        )
        async with supervisor:
            await supervisor.start(plan.stores(), timeout_s=STORES_TIMEOUT_S)
            yield plan


async def refused(url: str, *command: str) -> bool:
    async with redis.asyncio.Redis.from_url(url) as client:
        try:
            await client.execute_command(*command)  # type: ignore[no-untyped-call]  # so in redis-py
        except (NoPermissionError, AuthenticationError):
            return True
        return False


async def test_each_user_may_do_its_work_and_no_more(tmp_path: Path) -> None:
    async with stores(tmp_path) as plan:
        cache, worker, router = (
            plan.cache_redis.url(plan.state, each) for each in ("cache", "worker", "router")
        )
        ledger = plan.ledger_redis.url(plan.state, "ledger")
        allowed = [
            (cache, "SET", "tm:b:x", "1", "PX", "1000"),
            (cache, "EVAL", "return redis.call('GET', KEYS[1])", "1", "tm:b:x"),
            (cache, "INFO", "memory"),
            (worker, "HSET", "tm:worker:a", "role", "decode"),
            (worker, "ZADD", "tm:workers", "1", "a"),
            (router, "HGETALL", "tm:worker:a"),
            (router, "ZRANGE", "tm:workers", "0", "-1"),
            (ledger, "CONFIG", "GET", "appendfsync"),
            (ledger, "EVAL", "return redis.call('HSET', KEYS[1], 'a', 1)", "1", "tm:tenant:a"),
        ]
        for url, *command in allowed:
            assert not await refused(url, *command), command
        forbidden = [
            (cache, "HGETALL", "tm:worker:a"),
            (cache, "FLUSHALL"),
            (worker, "GET", "tm:b:x"),
            (worker, "CONFIG", "GET", "*"),
            (router, "DEL", "tm:worker:a"),
            (router, "HSET", "tm:worker:a", "address", "elsewhere"),
            (ledger, "CONFIG", "SET", "appendfsync", "no"),
            (ledger, "FLUSHALL"),
            (ledger, "SHUTDOWN"),
            (ledger, "KEYS", "*"),
        ]
        for url, *command in forbidden:
            assert await refused(url, *command), command
        anonymous = f"redis://127.0.0.1:{plan.ledger_redis.port}/0"
        assert await refused(anonymous, "PING")
        stranger = f"redis://cache:x@127.0.0.1:{plan.cache_redis.port}/0"
        assert await refused(stranger, "PING")


async def test_the_ledger_survives_a_restart_and_the_cache_need_not(tmp_path: Path) -> None:
    for life in range(2):
        async with stores(tmp_path) as plan:
            url = plan.ledger_redis.url(plan.state, "ledger")
            async with redis.asyncio.Redis.from_url(url, decode_responses=True) as client:
                if life == 0:
                    await client.set("tm:balance", "5")
                assert await client.get("tm:balance") == "5"
                assert await client.config_get("appendfsync") == {"appendfsync": "always"}
                policy = await client.config_get("maxmemory-policy")
                assert policy == {"maxmemory-policy": "noeviction"}
