"""What money adds to the time to first token, against one millisecond and two bare INCRs.

    python -m benchmarks.serving.hold_ttft [--rounds 600]

A router and two scripted workers that answer at once, in this process, asked by one client over
gRPC; the ledger is a Redis with AOF `always`. Requests take turns (ABAB): one with the treasury as
it is, one with a stand-in that grants at once and settles nowhere, and one INCR on the same
server. Figures are p50; the first tenth is left out.

Floor: a request is let in by one script in the ledger, a round trip with an fsync, as an INCR is;
no other command stands before the first token. What the client and the router, in this one process,
have to do meanwhile hides a part of it: `open` is the whole.
"""

import argparse
import asyncio
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from redis.asyncio import Redis

from benchmarks.provenance import commit, device
from benchmarks.serving.ledger_redis import ledger_redis
from services.router.admission import Admitted
from services.router.finish import Completed
from services.router.money.hold import Hold
from services.router.money.treasury import Treasury, size_of, terms_of
from tests.redis_process import RedisProcess
from tests.router_harness import (
    MODEL,
    RouterHarness,
    router_config,
    running_router,
    scripted,
    spell,
    write_byte_tokenizer,
)
from tests.scripted_worker import ScriptedWorker, answer
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.billing import ledger as rules
from tidemill.certs import make_dev_certs
from tidemill.rpc.tls import TlsFiles

RESULT = Path(__file__).with_name("results") / "hold_ttft.json"
GOAL_MS = 1.0  # and two INCRs


class NoLedger:
    """For whoever holds and settles: grants, keeps nothing and answers nothing."""

    async def submit(self, _: object) -> None: ...

    async def checkpoint(self, *_: object) -> rules.Done:
        return rules.Done()

    def add(self, _: object) -> None: ...

    def discard(self, _: object) -> None: ...


class AtOnce(Treasury):
    """Grants what was granted to the first request, without asking or computing anything."""

    def __init__(self, real: Treasury) -> None:
        nothing = cast(Any, NoLedger())
        self._free = replace(real._bank, accounts=nothing, cashier=nothing, leases=nothing)
        self._book = real._books.own
        self._like: Any = None

    async def open(self, admitted: Admitted) -> Hold | Completed:
        if self._like is None:
            terms = terms_of(admitted, self._book)
            self._like = terms, size_of(terms, self._book, admitted.admitted_at_ms)
        terms, size = self._like
        held = rules.Held(1, size.full_nano, True, admitted.admitted_at_ms, "", "", 0)
        return Hold(admitted, terms, held=held, size=size, book=self._book, bank=self._free)


async def ttft(harness: RouterHarness, request_id: str) -> float:
    """Milliseconds to the first token of a stream that is read to its end."""
    request = router_pb2.GenerateRequest(
        request_id=request_id,
        model=MODEL,
        prompt="x" * 100,
        sampling=sampling_pb2.Sampling(max_tokens=8),
    )
    begun = time.perf_counter()
    first = None
    async for message in harness.call(request):
        if first is None and message.HasField("chunk"):
            first = time.perf_counter() - begun
    assert first is not None
    return 1e3 * first


class Timed(Treasury):
    """The treasury as it is, and how long each `open` took, in milliseconds."""

    def __init__(self, real: Treasury) -> None:
        self._real = real
        self.spent: list[float] = []

    async def open(self, admitted: Admitted) -> Hold | Completed:
        begun = time.perf_counter()
        opened = await self._real.open(admitted)
        self.spent.append(1e3 * (time.perf_counter() - begun))
        return opened


async def measure(folder: Path, ledger: RedisProcess, rounds: int) -> dict[str, float]:
    certs = folder / "certs"
    make_dev_certs(certs)

    def tls(role: str) -> TlsFiles:
        return TlsFiles(cert=certs / f"{role}.pem", key=certs / f"{role}.key", ca=certs / "ca.pem")

    write_byte_tokenizer(folder)
    workers = [
        ScriptedWorker("prefill-0", "prefill"),
        ScriptedWorker("decode-0", "decode", answer(spell(folder, "hello"))),
    ]
    redis = Redis.from_url(ledger.url)
    spent: dict[str, list[float]] = {"money": [], "at_once": [], "incr": []}
    async with scripted(workers, tls) as endpoints:
        config = router_config(folder, ledger, endpoints, tls("router"))
        async with running_router(config) as harness:
            timed = Timed(harness.process.money.treasury)
            treasuries = {"money": timed, "at_once": AtOnce(harness.process.money.treasury)}
            for number in range(rounds + rounds // 10):
                for name, treasury in treasuries.items():
                    harness.process.router._treasury = treasury
                    spent[name].append(await ttft(harness, f"{name}-{number}"))
                begun = time.perf_counter()
                await redis.incr("bare")
                spent["incr"].append(1e3 * (time.perf_counter() - begun))
    await redis.aclose()
    spent["open"] = timed.spent
    return {
        name: round(statistics.median(values[rounds // 10 :]), 3) for name, values in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with ledger_redis() as (folder, server):
        p50_ms = asyncio.run(measure(folder, server, arguments.rounds))
    report = {
        "command": f"python -m benchmarks.serving.hold_ttft --rounds {arguments.rounds}",
        "commit": commit(),
        "device": device(),
        "python": platform.python_version(),
        "p50_ms": p50_ms,
        "added_ms": round(p50_ms["money"] - p50_ms["at_once"], 3),
        "goal_ms": round(GOAL_MS + 2 * p50_ms["incr"], 3),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
