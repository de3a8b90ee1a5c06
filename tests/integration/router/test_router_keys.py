"""Tenants, keys and the ledger behind them, over the wire."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.router import wiring
from services.router.authentication import Authenticator
from services.router.keys import KeyStore
from tests.redis_process import RedisProcess
from tests.router_harness import (
    ADMIN_KEY,
    DURABLE,
    MODEL,
    RouterHarness,
    bearer,
    router_config,
    running_router,
    scripted,
)
from tests.scripted_worker import ScriptedWorker, answer
from tidemill.api.router.v1 import admin_service_pb2 as admin_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import ConfigError, TidemillError
from tidemill.rpc.status import from_rpc_error
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis


def ask(request_id: str = "r1") -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, prompt="hello")


async def refusal(call: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("", "API_KEY_MISSING"),
        ("tm_abcdefabcdef.not-a-secret", "API_KEY_UNKNOWN"),
        ("no key at all", "API_KEY_UNKNOWN"),
        ("tm_../../x.y", "API_KEY_UNKNOWN"),
        ("tm_a." + "x" * 4000, "API_KEY_UNKNOWN"),
        (ADMIN_KEY, "ADMIN_KEY_HAS_NO_ACCOUNT"),
    ],
)
async def test_without_a_good_key_nothing_is_generated(
    router: RouterHarness, key: str, reason: str
) -> None:
    heard = await router.generate(ask(), key=key)
    assert heard.error is not None
    assert (heard.error.code, heard.error.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)
    assert (await router.generate(ask())).error is None


async def test_the_right_id_with_a_wrong_secret_is_unknown(router: RouterHarness) -> None:
    heard = await router.generate(ask(), key=router.key[:-1] + "~")
    assert heard.error is not None
    assert heard.error.reason == "API_KEY_UNKNOWN"


async def test_a_revoked_key_stops_within_five_seconds(router: RouterHarness) -> None:
    await router.generate(ask())
    key_id = router.key.removeprefix("tm_").partition(".")[0]
    revoke = admin_pb2.RevokeKeyRequest(key_id=key_id)
    first = await router.admin.RevokeKey(revoke, metadata=bearer(ADMIN_KEY))
    again = await router.admin.RevokeKey(revoke, metadata=bearer(ADMIN_KEY))
    assert (first.revoked, again.revoked) == (True, False)
    revoked_at = time.monotonic()
    heard = await router.generate(ask())
    while heard.error is None:
        assert time.monotonic() - revoked_at < 5
        await asyncio.sleep(0.2)
        heard = await router.generate(ask())
    assert heard.error.reason == "API_KEY_REVOKED"


async def test_only_the_admin_key_opens_the_admin_service(router: RouterHarness) -> None:
    request = admin_pb2.ListKeysRequest()
    for metadata in ((), bearer(router.key), bearer("wrong"), bearer("")):
        error = await refusal(router.admin.ListKeys(request, metadata=metadata))
        assert (error.code, error.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "ADMIN_KEY_REQUIRED",
        )


async def test_every_method_refuses_a_caller_without_credentials(router: RouterHarness) -> None:
    for file, module in (
        (router_pb2.DESCRIPTOR, "RouterService"),
        (admin_pb2.DESCRIPTOR, "AdminService"),
    ):
        service = file.services_by_name[module]
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            call: Any = router.channel.unary_unary(path)
            error = await refusal(call(b""))
            assert error.code is grpc.StatusCode.UNAUTHENTICATED, path


async def test_tenants_are_made_once_and_keep_their_currency(router: RouterHarness) -> None:
    def create(currency: str, tenant: str = "stark") -> Any:
        request = admin_pb2.CreateTenantRequest(tenant_id=tenant, currency=currency)
        return router.admin.CreateTenant(request, metadata=bearer(ADMIN_KEY))

    assert (await create("USD")).created
    assert not (await create("USD")).created
    assert (await refusal(create("CNY"))).code is grpc.StatusCode.ALREADY_EXISTS
    assert (await refusal(create("EUR", "other"))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refusal(create("USD", "No Good"))).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_key_needs_a_tenant_and_a_revocation_a_key(router: RouterHarness) -> None:
    key = admin_pb2.CreateKeyRequest(tenant_id="nobody")
    error = await refusal(router.admin.CreateKey(key, metadata=bearer(ADMIN_KEY)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TENANT_NOT_FOUND")
    revoke = admin_pb2.RevokeKeyRequest(key_id="nokey")
    error = await refusal(router.admin.RevokeKey(revoke, metadata=bearer(ADMIN_KEY)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND")


async def test_keys_are_listed_in_pages_without_their_secrets(router: RouterHarness) -> None:
    keys = [await router.make_tenant("umbrella") for _ in range(5)]
    listed: list[admin_pb2.KeyInfo] = []
    token = ""
    for expected in (2, 2, 1):
        request = admin_pb2.ListKeysRequest(tenant_id="umbrella", page_size=2, page_token=token)
        page = await router.admin.ListKeys(request, metadata=bearer(ADMIN_KEY))
        assert len(page.keys) == expected
        listed += page.keys
        token = page.next_page_token
    assert token == ""
    assert [key.key_id for key in listed] == sorted(
        key.removeprefix("tm_").partition(".")[0] for key in keys
    )
    assert not any(key.partition(".")[2] in str(listed) for key in keys)
    everyone = await router.admin.ListKeys(admin_pb2.ListKeysRequest(), metadata=bearer(ADMIN_KEY))
    assert len(everyone.keys) > 5
    of_nobody = admin_pb2.ListKeysRequest(tenant_id="nobody")
    error = await refusal(router.admin.ListKeys(of_nobody, metadata=bearer(ADMIN_KEY)))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "TENANT_NOT_FOUND")


async def test_the_ledger_holds_no_secret(router: RouterHarness, ledger: RedisProcess) -> None:
    secret = router.key.partition(".")[2].encode()
    dump = b"".join(path.read_bytes() for path in ledger.directory.rglob("*.aof"))
    assert router.key.partition(".")[0].removeprefix("tm_").encode() in dump
    assert secret not in dump


async def test_without_the_ledger_nothing_begins_and_keys_last_two_seconds(
    model_dir: Path,
    redis_server: Callable[..., RedisProcess],
    tls_files: Callable[[str], TlsFiles],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def authenticator(store: KeyStore, **settings: Any) -> Authenticator:
        return Authenticator(store, **{**settings, "clock": lambda: now})

    monkeypatch.setattr(wiring, "Authenticator", authenticator)
    ledger = redis_server(**DURABLE)
    workers = [ScriptedWorker("p", "prefill"), ScriptedWorker("d", "decode", answer([50, 51]))]
    async with scripted(workers, tls_files) as endpoints:
        config = router_config(model_dir, ledger, endpoints, tls_files("router"))
        async with running_router(config) as router:
            other = await router.make_tenant("other")
            assert (await router.generate(ask("r1"))).error is None
            ledger.kill()
            for key in (None, other):
                heard = await router.generate(ask("r2"), key=key)
                assert heard.error is not None
                assert (heard.error.code, heard.error.reason) == (
                    grpc.StatusCode.UNAVAILABLE,
                    "LEDGER_UNAVAILABLE",
                )
                assert heard.error.retry_after_s is not None
            listing = router.stub.ListModels(
                router_pb2.ListModelsRequest(), metadata=bearer(router.key)
            )
            assert (await listing).models, "a key in use outlives a short absence"
            now = 2.0
            listing = router.stub.ListModels(
                router_pb2.ListModelsRequest(), metadata=bearer(router.key)
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await listing
            ledger.start()
            await router.until(lambda: router.process.ready)
            assert (await router.generate(ask("r5"))).error is None
            assert (await router.generate(ask("r6"), key=other)).error is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("maxmemory_policy", "allkeys-lru"),
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
    ],
)
async def test_a_ledger_that_may_lose_money_is_refused(
    model_dir: Path,
    redis_server: Callable[..., RedisProcess],
    tls_files: Callable[[str], TlsFiles],
    setting: str,
    value: str,
) -> None:
    ledger = redis_server(**{**DURABLE, setting: value})
    config = router_config(model_dir, ledger, ["both@127.0.0.1:1"], tls_files("router"))
    with pytest.raises(ConfigError, match=setting.replace("_", "-")) as refused:
        async with running_router(config, wait_ready=False):
            pass
    assert refused.value.reason == "LEDGER_NOT_DURABLE"


async def test_cancelled_callers_never_get_each_others_replies(router: RouterHarness) -> None:
    """redis-py#2624: a command cancelled in mid-flight must not shift the replies after it."""
    ledger = router.process.ledger

    async def echo(number: int) -> None:
        text = f"reply {number}".encode()
        reply = await ledger.run(lambda redis: redis.echo(text))
        assert reply == text

    for round_ in range(20):
        tasks = [asyncio.create_task(echo(round_ * 20 + each)) for each in range(20)]
        await asyncio.sleep(0.0005 * (round_ % 5))
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [each for each in results if isinstance(each, AssertionError)]
