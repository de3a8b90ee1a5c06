"""A durable Redis for the session, and accounts on it."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.router.config import LedgerConfig
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE


@pytest.fixture(scope="session")
def ledger_redis(redis_server: Callable[..., RedisProcess]) -> RedisProcess:
    return redis_server(**DURABLE)


@pytest.fixture
async def ledger(ledger_redis: RedisProcess) -> AsyncIterator[Ledger]:
    config = LedgerConfig(
        url=ledger_redis.url, pepper_file=Path(), admin_key_file=Path(), timeout_s=10.0
    )
    connected = Ledger(config)
    yield connected
    await connected.close()


@pytest.fixture
def accounts(ledger: Ledger) -> Accounts:
    return Accounts(ledger)
