"""Changing keys while everything runs: customers', the operator's, and the fleet's certificates.

The steps are those of docs/security.md, by the command that it names.
"""

import asyncio
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
import redis

from tests.redis_process import RedisProcess
from tests.router_harness import (
    ADMIN_KEY,
    DURABLE,
    MODEL,
    Heard,
    RouterHarness,
    bearer,
    router_config,
    running_router,
    scripted,
    spell,
    write_byte_tokenizer,
)
from tests.scripted_worker import ScriptedWorker, answer
from tests.security.surface import call
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.certs import make_dev_certs
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.probe import probe
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

COMMAND = Path(sys.executable).with_name("tidemill")
WITHIN_S = 5.0
LIST_MODELS = "/tidemill.api.router.v1.RouterService/ListModels"
LIST_KEYS = "/tidemill.api.router.v1.AdminService/ListKeys"
OK = grpc.StatusCode.OK
Routers = tuple[RouterHarness, RouterHarness]
Tls = Callable[[str], TlsFiles]
Record = Callable[[str, object], None]


@pytest.fixture
def byte_model(tmp_path: Path) -> Path:
    """A model of its own, and the secrets beside it: the tests change them."""
    write_byte_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
async def workers(byte_model: Path, tls_files: Tls) -> AsyncIterator[list[str]]:
    slowly = answer(spell(byte_model, "a long answer, byte by byte"), pause_s=0.1)
    fleet = [ScriptedWorker("p", "prefill"), ScriptedWorker("d", "decode", slowly)]
    async with scripted(fleet, tls_files) as endpoints:
        yield endpoints


@pytest.fixture
async def routers(
    byte_model: Path, ledger: RedisProcess, workers: list[str], tls_files: Tls
) -> AsyncIterator[Routers]:
    config = router_config(byte_model, ledger, workers, tls_files("router"))
    async with running_router(config) as one, running_router(config) as other:
        yield one, other


async def tidemill(router: RouterHarness, *arguments: str) -> str:
    """Run the operator's command; what it prints."""
    process = await asyncio.create_subprocess_exec(
        COMMAND,
        *arguments,
        env={
            "TIDEMILL_ADDRESS": router.process.server.address,
            "TIDEMILL_ADMIN_KEY": ADMIN_KEY,
        },
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def opens(router: RouterHarness, key: str, path: str = LIST_MODELS) -> bool:
    return (await call(router.channel, path, key=key)).code is OK


def ask(request_id: str) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, prompt="hello")


async def test_a_key_is_changed_without_a_refusal_and_revoked_everywhere_within_five_seconds(
    routers: Routers, record_property: Record
) -> None:
    one, other = routers
    old = one.key
    assert await opens(one, old)
    assert await opens(other, old)
    made = await tidemill(one, "keys", "create", "acme", "--label", "2026-11")
    new = next(word for word in made.split() if word.startswith("tm_") and "." in word)
    for router in routers:
        assert await opens(router, new), "a new key opens every router at once"
        assert await opens(router, old), "and the old one still does"
    running = asyncio.create_task(one.generate(ask("r1"), key=old))
    await one.until(lambda: len(one.process.requests) == 1)
    assert await opens(other, old), "asked for just now: the most that is remembered"
    revoke = admin_pb2.RevokeKeyRequest(key_id=key_id(old))
    assert (await one.admin.RevokeKey(revoke, metadata=bearer(ADMIN_KEY))).revoked
    revoked_at = time.monotonic()
    left = {"one": one, "other": other}
    while left:
        for name, router in [*left.items()]:
            if not await opens(router, old):
                record_property(name, round(time.monotonic() - revoked_at, 2))
                del left[name]
        assert time.monotonic() - revoked_at < WITHIN_S
        await asyncio.sleep(0.05)
    for router in routers:
        assert await opens(router, new)
        assert (await router.generate(ask(f"late-{id(router)}"), key=new)).error is None
    heard: Heard = await running
    assert heard.text == "a long answer, byte by byte", "what had begun is finished and billed"
    assert heard.completed.receipt.amount_nano > 0
    await tidemill(one, "keys", "revoke", key_id(old))  # by the command, and safe to repeat


def key_id(key: str) -> str:
    return key.removeprefix("tm_").partition(".")[0]


async def test_the_operators_key_is_changed_by_its_file_and_a_restart(
    byte_model: Path, ledger: RedisProcess, workers: list[str], tls_files: Tls
) -> None:
    config = router_config(byte_model, ledger, workers, tls_files("router"))
    async with running_router(config) as before:
        customer = before.key
        assert await opens(before, ADMIN_KEY, LIST_KEYS)
    fresh = "another-admin-key-0123456789abcdef"
    (byte_model / "admin").write_text(fresh)
    async with running_router(config, wait_ready=False) as after:
        assert await opens(after, fresh, LIST_KEYS)
        assert not await opens(after, ADMIN_KEY, LIST_KEYS)
        assert await opens(after, customer), "customers' keys are none of it"


async def test_another_pepper_lets_nobody_in_and_the_old_one_everybody_again(
    byte_model: Path, ledger: RedisProcess, workers: list[str], tls_files: Tls
) -> None:
    config = router_config(byte_model, ledger, workers, tls_files("router"))
    async with running_router(config) as before:
        customer = before.key
    pepper = (byte_model / "pepper").read_text()
    for text, expected in (("q" * 40, False), (pepper, True)):
        (byte_model / "pepper").write_text(text)
        async with running_router(config, wait_ready=False) as router:
            assert await opens(router, customer) is expected


async def test_the_fleets_authority_is_changed_in_three_steps_with_no_call_refused(
    tmp_path: Path,
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make_dev_certs(old)
    make_dev_certs(new)
    both = tmp_path / "both.pem"
    both.write_bytes((old / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes())
    steps = [  # each process in turn goes from one to the next, so neighbours meet
        (old, old / "ca.pem"),
        (old, both),
        (new, both),
        (new, new / "ca.pem"),
    ]
    for before, after in itertools.pairwise(steps):
        for serving, calling in ((before, after), (after, before), (after, after)):
            assert await greets(files(*serving, "decode"), files(*calling, "router")) == "SERVING"
    gone = files(old, both, "router")
    assert await greets(files(new, new / "ca.pem", "decode"), gone) == "UNAVAILABLE"


def test_a_redis_password_is_changed_with_both_good_in_between(
    redis_server: Callable[..., RedisProcess],
) -> None:
    server = redis_server(**DURABLE)
    old, new = server.password, "n" * 32
    config = server.directory / "redis.conf"
    as_it_was = config.read_text()
    for passwords, good in ((f">{old} >{new}", {old, new}), (f">{new}", {new})):
        config.write_text(as_it_was.replace(f">{old}", passwords))
        server.password = new
        server.stop()
        server.start()
        assert {each for each in (old, new) if logs_in(server, each)} == good


def logs_in(server: RedisProcess, password: str) -> bool:
    with redis.Redis(port=server.port, username=server.user, password=password) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False


def files(folder: Path, authority: Path, role: str) -> TlsFiles:
    return TlsFiles(cert=folder / f"{role}.pem", key=folder / f"{role}.key", ca=authority)


async def greets(serving: TlsFiles, calling: TlsFiles) -> str:
    server = RpcServer(ServerConfig(tls=serving, drain_s=0), public=False, readiness=lambda: None)
    await server.start()
    try:
        async with internal_channel(server.address, role="decode", tls=calling) as channel:
            return await probe(channel)
    finally:
        await server.drain()
