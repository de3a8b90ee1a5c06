"""C1: nobody's KV serves another tenant. By what is counted as reused, and by the clock.

Each audit is shown to see what it looks for: with the salt off, that is with two tenants given one
salt, the same traffic gives the sharing away.
"""

import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pytest
import redis

from tests.cache_node import Tls, cache_node
from tests.redis_process import RedisProcess
from tests.router_harness import MODEL, RouterHarness, bearer
from tests.router_workers import router_over
from tests.security.kolmogorov_smirnov import p_value
from tests.worker_harness import PATIENT, prompt_of, settled, split_of, worker_at
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.worker.config import CacheConfig, Role

pytestmark = pytest.mark.redis

Record = Callable[[str, object], None]
BLOCK = 64
PROBE_TOKENS = BLOCK + 1  # one block to be found: the least that sharing could give away
DETECTED = 1e-6  # chance below which a difference is one
NOTHING = 1e-3  # chance above which there is none


def ask(request_id: str, token_ids: list[int]) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        tokens=router_pb2.TokenInput(token_ids=token_ids),
        sampling=sampling_pb2.Sampling(temperature=0, max_tokens=1),
    )


def give_salt_of(ledger: RedisProcess, tenant: str, other: str) -> None:
    """Switch C1 off between two tenants, before `other` is first seen."""
    with redis.Redis.from_url(ledger.url) as client:
        salt = client.hget(f"tm:tenant:{tenant}", "salt")
        client.hset(f"tm:tenant:{other}", "salt", salt)


@dataclass
class Counted:
    """What was reused, by tier; `foreign` is what the tenant had never sent itself."""

    tiers: Counter[str] = field(default_factory=Counter)
    foreign: list[str] = field(default_factory=list)


@asynccontextmanager
async def all_tiers(
    model_dir: Path, ledger: RedisProcess, tls: Tls, folder: Path
) -> AsyncIterator[RouterHarness]:
    """Two small workers with host memory, and a cache whose memory overflows onto its disk."""
    block_bytes = 3 * BLOCK * 48 * 4
    async with (
        cache_node(
            tls, capacity_bytes=32 * block_bytes, disk_path=folder, disk_capacity_bytes=1 << 30
        ) as cache,
        worker_at(
            Role.BOTH,
            model_dir,
            tls,
            worker_id="a",
            num_blocks=16,
            host_cache_blocks=4,
            cache=CacheConfig(cache.server.address, client=PATIENT),
        ) as a,
        worker_at(
            Role.BOTH,
            model_dir,
            tls,
            worker_id="b",
            num_blocks=16,
            host_cache_blocks=4,
            cache=CacheConfig(cache.server.address, client=PATIENT),
        ) as b,
        router_over(model_dir, ledger, tls, f"both@{a.address}", f"both@{b.address}") as router,
    ):
        yield router
        await settled(a, b)


async def count(
    router: RouterHarness, keys: dict[str, str], *, num_requests: int, seed: int
) -> Counted:
    """Tenants ask prompts that begin alike; each may reuse what it has sent itself, no more."""
    rng, counted = random.Random(seed), Counted()
    sent: dict[str, set[tuple[int, ...]]] = {tenant: set() for tenant in keys}
    for number in range(num_requests):
        tenant = rng.choice(sorted(keys))
        prompt = prompt_of(rng.randrange(65, 450), seed=rng.randrange(1, 5))
        heard = await router.generate(ask(f"{seed}-{number}", prompt), key=keys[tenant])
        split = split_of(heard.completed.usage.prompt)
        computed = split.pop("computed")
        counted.tiers.update(split)
        starts = [tuple(prompt[:end]) for end in range(BLOCK, len(prompt) + 1, BLOCK)]
        own = BLOCK * sum(start in sent[tenant] for start in starts)
        if len(prompt) - computed > own:
            counted.foreign.append(f"{tenant} reused {split} of {len(prompt)}, sent {own}")
        sent[tenant].update(starts)
    return counted


async def count_twice(
    model_dir: Path, ledger: RedisProcess, tls: Tls, folder: Path, num_requests: int
) -> tuple[Counted, Counted]:
    """With salts of their own, then with one salt for two of them."""
    async with all_tiers(model_dir, ledger, tls, folder) as router:
        names = ("alice", "bob", "carol")
        apart = {name: await router.make_tenant(name) for name in names}
        first = await count(router, apart, num_requests=num_requests, seed=1)
        alike = {name: await router.make_tenant(name) for name in ("dave", "erin")}
        give_salt_of(ledger, "dave", "erin")
        return first, await count(router, alike, num_requests=num_requests, seed=2)


async def test_by_the_counts_no_tenant_reuses_what_another_computed(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls, tmp_path: Path
) -> None:
    apart, alike = await count_twice(model_dir, ledger, tls_files, tmp_path, 60)
    assert apart.foreign == []
    assert len(apart.tiers) >= 2, "the audit must see reuse to say whose it was"
    assert alike.foreign, "and must see sharing where there is some"


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_by_the_counts_of_two_thousand_requests_through_every_tier(
    model_dir: Path,
    ledger: RedisProcess,
    tls_files: Tls,
    tmp_path: Path,
    record_property: Record,
) -> None:
    apart, alike = await count_twice(model_dir, ledger, tls_files, tmp_path, 2000)
    record_property("reused_tokens", dict(apart.tiers))
    record_property("foreign_with_one_salt", len(alike.foreign))
    assert apart.foreign == []
    assert {"device", "host", "cache_ram", "cache_disk"} <= set(apart.tiers)
    assert alike.foreign


@dataclass
class Probes:
    """Seconds that one token took: after prompts that the victim had sent, and after fresh ones."""

    known: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)

    @property
    def gain_ms(self) -> float:
        """By how much known prompts are quicker, by their medians."""
        return 1000 * (median(self.fresh) - median(self.known))

    @property
    def chance(self) -> float:
        """Of such a difference if there were none."""
        return p_value(self.known, self.fresh)


async def probe_pairs(
    router: RouterHarness, keys: dict[str, str], *, num_pairs: int
) -> dict[str, Probes]:
    """The victim sends a prompt; each spy asks for it and for one that nobody has sent, in turn."""
    rng = random.Random(3)
    spies = {name: Probes() for name in keys if name != "victim"}

    async def seconds(key: str, request_id: str, prompt: list[int]) -> float:
        request, metadata = ask(request_id, prompt), bearer(key)
        began = time.perf_counter()
        async for _ in router.stub.Generate(request, metadata=metadata):
            pass
        return time.perf_counter() - began

    for number in range(num_pairs):
        known, fresh = (prompt_of(PROBE_TOKENS, seed=10_000 + 2 * number + odd) for odd in (0, 1))
        await seconds(keys["victim"], f"v{number}", known)
        for name, probes in spies.items():
            pair = [(probes.known, known), (probes.fresh, fresh)]
            rng.shuffle(pair)
            for into, prompt in pair:
                into.append(await seconds(keys[name], f"p{number}-{len(into)}-{id(into)}", prompt))
    return spies


@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_by_the_clock_no_tenant_learns_what_another_sent(
    model_dir: Path, ledger: RedisProcess, tls_files: Tls, record_property: Record
) -> None:
    """2,000 pairs for a spy with a salt of its own, and for one that has the victim's."""
    async with (
        worker_at(Role.BOTH, model_dir, tls_files, num_blocks=2048) as worker,
        router_over(model_dir, ledger, tls_files, f"both@{worker.address}") as router,
    ):
        keys = {name: await router.make_tenant(name) for name in ("victim", "spy", "twin")}
        give_salt_of(ledger, "victim", "twin")
        found = await probe_pairs(router, keys, num_pairs=2000)
        await settled(worker)
    spy, twin = found["spy"], found["twin"]
    shifted = p_value([each - 0.002 for each in spy.known], spy.fresh)
    for name, value in (
        ("gain_ms_salt_on", spy.gain_ms),
        ("chance_salt_on", spy.chance),
        ("gain_ms_salt_off", twin.gain_ms),
        ("chance_salt_off", twin.chance),
        ("chance_of_2_ms", shifted),
        ("median_ms", 1000 * median(spy.fresh)),
    ):
        record_property(name, f"{value:.3g}")
    assert twin.chance < DETECTED, "the audit sees a shared block"
    assert shifted < DETECTED, "and would see 2 ms"
    assert spy.chance > NOTHING, "and there is nothing to be seen"
