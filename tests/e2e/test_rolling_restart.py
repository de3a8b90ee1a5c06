"""Every service restarted in turn under load: no request fails, no bill is lost (adr/0024)."""

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from services.stack.plan import MODEL
from tests.chaos.audit import Books, auditing, check_receipts
from tests.chaos.customers import QUESTIONS
from tests.chaos.fleet import LEDGER, ROUTERS, WORKERS, Fleet
from tests.mock_worker import MockConfig
from tests.mock_workers import MockProcess, mock_workers
from tests.name_server import name_server
from tests.stack_harness import ROUTER_HOSTS, START_S, eventually
from tests.steady_load import SteadyLoad, percentile
from tests.tiny_model import make_tiny_checkpoint
from tidemill.blocks import BLOCK_TOKENS

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

NAME = "routers.test"
CACHE_REDIS = "redis-cache"
PROCESSES = 2
DRAIN_S = 60.0
SETTINGS = {
    section: {"server": {"drain_s": DRAIN_S}}
    for section in ("router", "prefill", "decode", "cache")
} | {"router": {"server": {"drain_s": DRAIN_S}, "money": {"router_id": "router"}}}
SEEN_WITHIN_S = 2.0
BETWEEN_S = 2.0  # for clients to have called the returned one


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=8192)


@contextmanager
def stopped_well(fleet: Fleet) -> Iterator[Fleet]:
    """In the end all that still runs must end as it should."""
    yield fleet
    statuses = fleet.stack.stop()
    assert not any(statuses.values()), statuses


@pytest.fixture
def fleet(tmp_path: Path, model_dir: Path) -> Iterator[Fleet]:
    made = Fleet(tmp_path / "state", model_dir, router_name=NAME, settings=SETTINGS)
    with stopped_well(made):
        yield made


@pytest.fixture
def one_port(tmp_path: Path, model_dir: Path) -> Iterator[Fleet]:
    """Its first router is two processes; the second is not to be started."""
    made = Fleet(tmp_path / "state", model_dir, router_processes=PROCESSES, settings=SETTINGS)
    with stopped_well(made):
        yield made


@asynccontextmanager
async def two_mocks(fleet: Fleet, *routers: str) -> AsyncIterator[MockProcess]:
    """These routers and both Redis, over a mock prefill worker and the mock decode worker given."""
    prefill = MockConfig(worker_id="p", role="prefill", model=MODEL, prefill_tokens_per_s=20_000)
    decode = MockConfig(worker_id="d", role="decode", model=MODEL, decode_step_s=0.01)
    await start(fleet, LEDGER, CACHE_REDIS)
    async with mock_workers(fleet.stack.tls, prefill, decode) as processes:
        workers = ",".join(endpoint for each in processes for endpoint in each.endpoints)
        for name in routers:
            fleet[name].environ = {"TIDEMILL_ROUTER_FLEET_WORKERS": workers}
        await start(fleet, *routers)
        yield processes[1]


@asynccontextmanager
async def under_load(
    fleet: Fleet, target: str, *, customers: int, max_tokens: int, workers: Sequence[str]
) -> AsyncIterator[SteadyLoad]:
    """Customers at `target` meanwhile; afterwards nothing of any request is open."""
    tenants = ("alice", "bob")
    keys = {tenant: await fleet.stack.key_of(tenant) for tenant in tenants}
    async with auditing(fleet, tenants) as auditor:
        load = SteadyLoad(fleet, target, keys, max_tokens)
        shopping = asyncio.create_task(load.run(customers, seed=20251122))
        try:
            await asyncio.sleep(0.5)
            yield load
            await asyncio.sleep(0.5)
        finally:
            load.closing.set()
            await shopping
        await auditor.until_quiet(workers)
        load.books = Books(accounts=await auditor.read())


async def restart(fleet: Fleet, name: str) -> float:
    """SIGTERM, its end, a start, ready again; seconds from start to ready."""
    fleet[name].send(signal.SIGTERM)
    assert await fleet[name].ended(2 * DRAIN_S) == 0
    began = time.monotonic()
    await fleet.restart(name)
    return time.monotonic() - began


async def start(fleet: Fleet, *names: str) -> None:
    """Start these, all at once, and wait until all serve."""
    for name in names:
        fleet[name].start()
    await asyncio.gather(*(fleet[name].ready() for name in names))


def children(pid: int) -> set[int]:
    """The process ids of a process's children."""
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def seconds_to_see_workers(fleet: Fleet, router: str) -> float:
    """How long a router's last start took until it knew all workers again."""
    told = [each for each in fleet[router].log_records() if each["message"] == "workers seen"]
    return float(told[-1]["after_s"])


async def expected_hit_tokens(load: SteadyLoad, router: str) -> int:
    """What a router says of a prompt that other routers had served before it was started."""
    async with load.fleet.stack.client(load.keys["alice"], router=router) as client:
        longest = max((each.prompt for each in QUESTIONS), key=len)
        return (await client.quote(longest, model=MODEL, max_tokens=1)).expected_hit_tokens


def check(load: SteadyLoad) -> None:
    """Nobody noticed, and each answer has one charge, the one that was received."""
    assert not load.failures, load.failures[:3]
    assert load.reached
    assert not load.missed
    load.books.check()
    check_receipts(load.books, load.outcomes)
    answered = [each for each in load.outcomes if each.completion is not None]
    charged = load.books.charges
    assert {each.order.request_id for each in answered} == set(charged)


def tell(load: SteadyLoad) -> None:
    """What it was like, for whoever reads the test's output."""
    first = percentile(load.ttfts_s, 0.5), percentile(load.ttfts_s, 0.99), max(load.ttfts_s)
    sys.stdout.write(
        f"\n{len(load.outcomes)} requests, {len(load.failures)} failed, repeated: "
        f"{dict(load.retries)}; {len(load.reached)} cancelled; "
        f"TTFT p50 {first[0]:.3f} s, p99 {first[1]:.3f} s, most {first[2]:.3f} s\n"
    )


async def test_routers_and_ledger_are_replaced_in_turn_and_nobody_notices(fleet: Fleet) -> None:
    async with two_mocks(fleet, *ROUTERS) as decode, name_server(NAME, ROUTER_HOSTS) as names:
        target = names.target(fleet.stack.plan.router_port)
        async with under_load(fleet, target, customers=16, max_tokens=60, workers=()) as load:
            await restart(fleet, ROUTERS[0])
            await asyncio.sleep(BETWEEN_S)
            await restart(fleet, ROUTERS[1])
            await restart(fleet, LEDGER)
        counts = (await decode.counts())["d"]
    tell(load)
    check(load)
    assert all(seconds_to_see_workers(fleet, name) <= SEEN_WITHIN_S for name in ROUTERS)
    assert counts.generated_tokens == load.books.generated_tokens
    assert counts.finals == counts.acknowledged


@pytest.mark.slow
async def test_processes_of_one_port_are_replaced_in_turn_and_nobody_notices(
    one_port: Fleet,
) -> None:
    router = one_port[ROUTERS[0]]

    async def replaced() -> bool:
        return any(
            each["message"] == "all processes were replaced" for each in router.log_records()
        )

    async with two_mocks(one_port, ROUTERS[0]) as decode:
        target = one_port.stack.plan.address
        async with under_load(one_port, target, customers=16, max_tokens=60, workers=()) as load:
            before = children(router.pid)
            router.send(signal.SIGHUP)
            await eventually(replaced, START_S)
            after = children(router.pid)
        counts = (await decode.counts())["d"]
    tell(load)
    check(load)
    assert len(before) == len(after) == PROCESSES
    assert not before & after
    assert counts.generated_tokens == load.books.generated_tokens
    assert counts.finals == counts.acknowledged


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_every_service_is_replaced_in_turn_and_nobody_notices(fleet: Fleet) -> None:
    await fleet.ready()
    async with name_server(NAME, ROUTER_HOSTS) as names:
        target = names.target(fleet.stack.plan.router_port)
        async with under_load(fleet, target, customers=8, max_tokens=40, workers=WORKERS) as load:
            for name in (*ROUTERS, *WORKERS, "cache", CACHE_REDIS, LEDGER):
                ready_s, before = await restart(fleet, name), len(load.outcomes)
                if name in ROUTERS:
                    assert await expected_hit_tokens(load, name) >= BLOCK_TOKENS
                await asyncio.sleep(BETWEEN_S if name in ROUTERS else 0.5)
                sys.stdout.write(
                    f"{name} ready after {ready_s:.1f} s; {before} requests until then, "
                    f"{len(load.failures)} failed\n"
                )
                sys.stdout.flush()
    tell(load)
    check(load)
    assert all(seconds_to_see_workers(fleet, name) <= SEEN_WITHIN_S for name in ROUTERS)
    unbilled = [json.loads(each.detail)["unbilled"] for each in load.books.entries("release")]
    assert not unbilled
    assert load.books.generated_tokens == sum(
        outcome.completion.usage.completion_tokens
        for outcome in load.outcomes
        if outcome.completion is not None
    )
