"""Broken and strange requests at every service: each is refused for what it is, or served.

Afterwards every port still says that it serves and does, and all pools are whole.
"""

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc
import pytest

from tests.router_harness import ADMIN_KEY, MODEL
from tests.router_workers import ask, check_usage
from tests.security import surface
from tests.security.deployment import Deployment
from tests.security.fuzzing import Fuzzer, Hints
from tests.security.surface import Method, call

pytestmark = pytest.mark.redis

Record = Callable[[str, object], None]

AT_ONCE = 16
SURPRISES = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
}
# Who calls (a certificate, or the kind of key), and what.
TARGETS = {
    "router": ("tenant", surface.ROUTER),
    "billing": ("tenant", surface.BILLING),
    "admin": ("admin", surface.ADMIN),
    "worker": ("router", surface.WORKER),
    "prefill": ("decode", surface.PREFILL),
    "decode": ("router", surface.DECODE),
    "peer": ("prefill", surface.CACHE),
    "cache": ("prefill", surface.CACHE),
}


@pytest.mark.parametrize("target", TARGETS)
async def test_two_thousand_strange_requests_surprise_nobody(
    deployment: Deployment,
    caplog: pytest.LogCaptureFixture,
    record_property: Record,
    target: str,
) -> None:
    await fuzz(deployment, caplog, record_property, target=target, num_calls=2_000, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", TARGETS)
async def test_a_hundred_thousand_strange_requests_surprise_nobody(
    deployment: Deployment,
    caplog: pytest.LogCaptureFixture,
    record_property: Record,
    target: str,
) -> None:
    await fuzz(deployment, caplog, record_property, target=target, num_calls=100_000, seed=2)


async def fuzz(
    deployment: Deployment,
    caplog: pytest.LogCaptureFixture,
    record_property: Record,
    *,
    target: str,
    num_calls: int,
    seed: int,
) -> None:
    caller, service = TARGETS[target]
    router = deployment.router
    key = {"tenant": router.key, "admin": ADMIN_KEY}.get(caller)
    fuzzer = Fuzzer(seed, hints_of(deployment))
    methods = itertools.cycle(surface.methods(service))
    codes: Counter[str] = Counter()
    surprises: list[str] = []
    left = num_calls

    async def keep_calling(channel: grpc.aio.Channel) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            method = next(methods)
            bodies = fuzzer.bodies(method.descriptor.input_type, streaming=is_streaming(method))
            answered = await call(channel, method.path, bodies, key=key)
            codes[answered.code.name] += 1
            if answered.code in SURPRISES:
                sent = [each.hex() for each in bodies]
                surprises.append(f"{method.path} {answered.code.name} {answered.error} {sent}")

    began = time.monotonic()
    with caplog.at_level(logging.ERROR):
        async with AsyncExitStack() as stack:
            channel = router.channel
            if key is None:
                port = deployment.cache_port if target == "cache" else deployment.worker_port
                channel = await stack.enter_async_context(deployment.holding(port, caller))
            await asyncio.gather(*(keep_calling(channel) for _ in range(AT_ONCE)))
    record_property("codes", dict(codes))
    record_property("calls_per_s", round(num_calls / (time.monotonic() - began)))
    assert surprises == []
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR] == []
    assert codes["OK"] > num_calls / 100, "the fuzzer never gets past the checks"
    assert codes["INVALID_ARGUMENT"] > num_calls / 5
    await check_serving(deployment)


async def check_serving(deployment: Deployment) -> None:
    """A customer who comes now is served and billed as ever."""
    router = deployment.router
    late = await router.make_tenant("late")
    heard = await router.generate(ask("late"), key=late)
    assert check_usage(heard, 200).completion_tokens == 12


def is_streaming(method: Method) -> bool:
    return method.descriptor.name in {"Decode", "StoreBlocks"}


def hints_of(deployment: Deployment) -> Hints:
    """What leads past the first checks."""
    layout = deployment.worker.worker.engine.layout
    return {
        "request_id": [f"r{number}" for number in range(40)],
        "operation_id": [f"o{number}" for number in range(40)],
        "model": [MODEL],
        "tenant_id": ["acme", "umbrella", "nobody"],
        "currency": ["USD", "USD", "CNY"],
        "token_ids": range(500),
        "max_tokens": [1, 2, 5],
        "relayed_tokens": [0],
        "funded_tokens": [5],
        "temperature": [0, 1],
        "model_digest": [b"", layout.model_digest],
        "layout_fingerprint": [layout.fingerprint()],
        "held_tokens": [0, 64],
        "kv_transport": ["grpc"],
        "epoch": [deployment.worker.worker.epoch],
        "first_token_timeout_ms": [5_000],
        "total_timeout_ms": [10_000],
        "from_ms": [0, 1_790_812_800_000],
        "to_ms": [1_790_812_800_000, 1_790_816_400_000],
        "zone": ["UTC", "Asia/Shanghai"],
        "total_bytes": [1, 300],
        "offset": [0, 1],
        "data": [b"d", b"d" * 300],
    }
