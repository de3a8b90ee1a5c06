"""One deployment for each test, over an empty ledger."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import redis

from tests.cache_node import Tls
from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE
from tests.security.deployment import Deployment, deployed
from tests.tiny_model import make_tiny_checkpoint


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ledger_redis(redis_server: Callable[..., RedisProcess]) -> RedisProcess:
    return redis_server(**DURABLE)


@pytest.fixture
def ledger(ledger_redis: RedisProcess) -> RedisProcess:
    """Empty: a request id that was settled in one test is new in the next."""
    with redis.Redis.from_url(ledger_redis.url) as client:
        client.flushall()
    return ledger_redis


@pytest.fixture
async def deployment(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls
) -> AsyncIterator[Deployment]:
    async with deployed(model_dir, ledger, tls_files) as made:
        yield made
