"""An empty ledger Redis, two scripted workers and a router for each test."""

import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from services.stack.state import SIGNING_KEY, new_signing_key
from tests.bank import Bank
from tests.redis_process import RedisProcess
from tests.router_harness import (
    ADMIN_KEY,
    BOOK_PATH,
    DURABLE,
    MODEL,
    RouterHarness,
    router_config,
    running_router,
    scripted,
    spell,
    write_byte_tokenizer,
)
from tests.scripted_worker import ScriptedWorker, answer
from tests.settlements import Settlements, ledger_accounts
from tidemill.rpc.tls import TlsFiles

Write = Callable[..., Path]

_IDENTITY = {"cert": "router.pem", "key": "router.key", "ca": "ca.pem"}
_tenants = itertools.count()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-model")
    write_byte_tokenizer(folder)
    return folder


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
def prefill() -> ScriptedWorker:
    return ScriptedWorker("prefill-0", "prefill")


@pytest.fixture
def decode(model_dir: Path) -> ScriptedWorker:
    return ScriptedWorker("decode-0", "decode", answer(spell(model_dir, "hello")))


@pytest.fixture
def limits() -> dict[str, Any]:
    """LimitsConfig fields; a test module or class may override."""
    return {}


@pytest.fixture
def price_book() -> Path:
    """The router's price book, with windows; a test module that counts on one price overrides."""
    return BOOK_PATH


@pytest.fixture
async def router(  # noqa: PLR0917 - fixtures
    model_dir: Path,
    ledger: RedisProcess,
    prefill: ScriptedWorker,
    decode: ScriptedWorker,
    tls_files: Callable[[str], TlsFiles],
    limits: dict[str, Any],
    price_book: Path,
) -> AsyncIterator[RouterHarness]:
    async with scripted([prefill, decode], tls_files) as endpoints:
        tls = tls_files("router")
        config = router_config(model_dir, ledger, endpoints, tls, price_book=price_book, **limits)
        async with running_router(config) as harness:
            yield harness


@pytest.fixture
async def bank(
    router: RouterHarness,
    model_dir: Path,
    ledger: RedisProcess,
    tls_files: Callable[[str], TlsFiles],
) -> AsyncIterator[Bank]:
    config = router_config(model_dir, ledger, ["both@127.0.0.1:1"], tls_files("router"))
    tenant_id = f"bank-{next(_tenants)}"
    key = await router.make_tenant(tenant_id)
    async with ledger_accounts(config) as accounts:
        yield Bank(router, Settlements(accounts, tenant_id), key)


@pytest.fixture
def write(tmp_path: Path, model_dir: Path, dev_certs: Path, ledger: RedisProcess) -> Write:
    """(**changes) -> a configuration file with public TLS and that many lines changed."""

    files = ((kind, dev_certs / name) for kind, name in _IDENTITY.items())
    identity = "{" + ", ".join(f'{kind} = "{file}"' for kind, file in files) + "}"

    def config(
        *,
        ledger_url: str = ledger.url,
        address: str = "127.0.0.1:0",
        workers: str = "both@127.0.0.1:1",
        pepper: str = "p" * 40,
        signing_key: str | None = None,
        price_model: str = "deepseek-chat",
        extra: str = "",
        metrics: str = "",
        router_id: str | None = None,
    ) -> Path:
        (tmp_path / "pepper").write_text(pepper)
        (tmp_path / "admin").write_text(ADMIN_KEY)
        (tmp_path / SIGNING_KEY).write_text(signing_key or new_signing_key())
        path = tmp_path / "tidemill.toml"
        path.write_text(
            f"""
[router]
price_book = "{BOOK_PATH}"
{extra}
[router.server]
address = "{address}"
drain_s = 0.2
tls = {identity}
{metrics}
[router.ledger]
url = "{ledger_url}"
pepper_file = "pepper"
admin_key_file = "admin"
timeout_s = 10.0
[router.money]
signing_key_file = "{SIGNING_KEY}"
spool_dir = "spool"
{"" if router_id is None else f'router_id = "{router_id}"'}
[router.fleet]
workers = ["{workers}"]
tls = {identity}
[[router.models]]
name = "{MODEL}"
path = "{model_dir}"
price_model = "{price_model}"
"""
        )
        return path

    return config
