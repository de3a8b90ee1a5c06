"""What a hold and a settlement cost, against bare INCR on the same durable server.

    python -m benchmarks.serving.ledger [--rounds 9] [--pairs 1500] [--samples 400]

One Redis (or Valkey) with AOF `always`, asked from one process and one event loop, as a router
does, by redis-py through a pool of 32 connections. Rounds alternate (ABAB); figures are medians,
the first round left out.

`throughput`: 32 callers, each a hold and its settlement one after the other through
services.router.money.accounts, against 32 callers that INCR; `pairs` with an account for each
caller, `one_account` with one for all: its receipts' chain is then SHA-256 in Lua. `latency_us`:
one caller's p50.

Floor: a pair is two round trips and two writes that are fsynced before they are answered, an INCR
one of each, so one after the other they are at best half as many as INCRs. What waits at the same
time shares round trips and fsyncs, the INCRs only the latter. The server's own time is shown apart
(`server_us`, its clock around each command): scripts run one by one.
"""

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.provenance import commit, device
from benchmarks.serving.ledger_redis import ledger_redis
from services.router.config import LedgerConfig
from services.router.money.accounts import Accounts
from services.router.money.ledger import Ledger
from tidemill.billing import ledger as rules

RESULT = Path(__file__).with_name("results") / "ledger.json"
CALLERS = 32
GOAL = 0.3
# As long as a router's own: what resolution needs, and a receipt with its attempts' busy time.
TERMS = json.dumps({"terms": "t" * 500})
RECORD = json.dumps({"record": "r" * 1400})
CONTENT = "5a" * 32

Act = Callable[[], Awaitable[object]]


class Ours:
    """Holds and settlements of one account."""

    def __init__(self, accounts: Accounts, tenant_id: str) -> None:
        self._accounts = accounts
        self._tenant_id = tenant_id
        self._numbers = count()
        self._open: list[str] = []

    async def hold(self) -> None:
        request_id = f"request-{next(self._numbers):012}"
        now_ms = time.time_ns() // 1_000_000
        held = await self._accounts.reserve(
            self._tenant_id,
            rules.Reserve(
                request_id=request_id,
                key_id="benchkey0001",
                body_sha256=CONTENT,
                owner="router-0",
                now_ms=now_ms,
                lease_ms=15_000,
                full_nano=3_000_000,
                least_nano=1_000_000,
                prompt_tokens=1000,
                max_tokens=1000,
                deadline_ms=now_ms + 600_000,
                terms=TERMS,
            ),
        )
        assert isinstance(held, rules.Held), held
        self._open.append(request_id)

    async def settle(self) -> None:
        now_ms = time.time_ns() // 1_000_000
        posted = await self._accounts.settle(
            self._tenant_id,
            rules.Settle(
                request_id=self._open.pop(),
                fence=1,
                now_ms=now_ms,
                decided_at_ms=now_ms,
                amount_nano=1_234_567,
                content_sha256=CONTENT,
                record=RECORD,
                total_tokens=1500,
            ),
        )
        assert isinstance(posted, rules.Posted), posted

    async def pair(self) -> None:
        await self.hold()
        await self.settle()


async def rate(acts: Sequence[Act], num: int) -> float:
    """Times a second that as many callers get through their act, `num` times in all."""
    left = iter(range(num))

    async def caller(act: Act) -> None:
        for _ in left:
            await act()

    begun = time.perf_counter()
    await asyncio.gather(*(caller(act) for act in acts))
    return num / (time.perf_counter() - begun)


async def throughput(callers: dict[str, Sequence[Act]], rounds: int, num: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in callers}
    for number in range(rounds + 1):
        for name, acts in callers.items():
            per_s = await rate(acts, num)
            if number:
                found[name].append(per_s)
    ratios = {
        name: [per_s / bare for per_s, bare in zip(values, found["incr"], strict=True)]
        for name, values in found.items()
    }
    return {
        "per_s": {name: round(statistics.median(values)) for name, values in found.items()},
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratios": [round(ratio, 3) for ratio in ratios["pairs"]],
        "goal": GOAL,
    }


async def latency(acts: dict[str, Act], samples: int) -> dict[str, float]:
    """p50 of each in microseconds, taken in turn."""
    spent: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(samples + samples // 10):
        for name, act in acts.items():
            begun = time.perf_counter()
            await act()
            if number >= samples // 10:
                spent[name].append(time.perf_counter() - begun)
    return {name: round(1e6 * statistics.median(values)) for name, values in spent.items()}


async def server_us(redis: Redis, acts: dict[str, Act], num: int = 300) -> dict[str, float]:
    """Microseconds of the server's own for each, by its clock."""
    found = {}
    for name, act in acts.items():
        await redis.config_resetstat()
        for _ in range(num):
            await act()
        commands: dict[str, Any] = await redis.info("commandstats")
        script = commands.get("cmdstat_evalsha") or commands["cmdstat_incrby"]
        found[name] = script["usec_per_call"]
    return found


async def measure(url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    config = LedgerConfig(url=url, pepper_file=Path(), admin_key_file=Path())
    pool: Any = BlockingConnectionPool.from_url(url, max_connections=CALLERS, timeout=10)
    redis = Redis(connection_pool=pool)
    ledger = Ledger(config)
    await ledger.check_settings()
    accounts = Accounts(ledger)
    tenants = [f"bench-{number}" for number in range(CALLERS)]
    for tenant_id in tenants:
        credit = rules.TopUp(operation_id="credit", now_ms=0, amount_nano=rules.MAX_NANO)
        assert isinstance(await accounts.top_up(tenant_id, credit), rules.Applied)
    each = [Ours(accounts, tenant_id) for tenant_id in tenants]
    one = each[0]

    async def incr() -> None:
        await redis.incr("bare")

    acts: dict[str, Act] = {"incr": incr, "hold": one.hold, "settle": one.settle}
    callers: dict[str, Sequence[Act]] = {
        "incr": [incr] * CALLERS,
        "pairs": [ours.pair for ours in each],
        "one_account": [one.pair] * CALLERS,
    }
    server: dict[str, Any] = await redis.info("server")
    report = {
        "server": server.get("valkey_version") or server["redis_version"],
        "throughput": await throughput(callers, arguments.rounds, arguments.pairs),
        "latency_us": await latency(acts, arguments.samples),
        "server_us": await server_us(redis, acts),
    }
    for tenant_id in tenants:
        faults = rules.check(await accounts.read(tenant_id))
        assert not faults, faults
    await ledger.close()
    await redis.aclose(close_connection_pool=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=1500, help="a round")
    parser.add_argument("--samples", type=int, default=400, help="of each latency")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with ledger_redis() as (_, server):
        measured = asyncio.run(measure(server.url, arguments))
    report = {
        "command": f"python -m benchmarks.serving.ledger --rounds {arguments.rounds} "
        f"--pairs {arguments.pairs} --samples {arguments.samples}",
        "commit": commit(),
        "device": device(),
        "python": platform.python_version(),
        "redis-py": version("redis"),
        "callers": CALLERS,
        **measured,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
