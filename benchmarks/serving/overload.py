"""Goodput of a real router when more is asked than its workers can do.

    python -m benchmarks.serving.overload [--seconds 8] [--deadline 2.0]

A router process, two mock prefill workers of 10,000 tokens/s each and a mock decode worker, and the
ledger's Redis (AOF `always`). Four tenants send prompts of 1,000 tokens in an open loop (Poisson)
at multiples of the prefill workers' rate. Goodput is requests a second whose first token came
before the deadline, counted from sending, for those sent after a warm-up of 3 s. `peak` is the
best row's; the goal is 0.9 of it at three times the capacity.

`blind` is the baseline of the same run: three times the capacity, but the router is not told the
deadline, so it refuses nobody for it and serves everybody in turn, until the client hangs up.

`late` were let in and missed the deadline; `refused_ms` is how long a refusal took, p95; `retry_s`
are the least and the most that RetryInfo said; `wait_error` is |expected wait told on acceptance -
real| in seconds, p50 and p90. Floor: no goodput above the prefill workers' rate.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, cast

import grpc
import uvloop

from benchmarks.provenance import commit, device
from benchmarks.serving.ledger_redis import ledger_redis
from benchmarks.serving.router_process import python_process, tls_files, write_config
from services.stack.ports import free_port
from tests.mock_worker import MockConfig
from tests.mock_workers import mock_workers
from tests.router_harness import (
    MODEL,
    RouterCaller,
    bearer,
    write_byte_tokenizer,
)
from tidemill.api.common.v1 import sampling_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.certs import make_dev_certs
from tidemill.rpc.options import SDK_CLIENT
from tidemill.rpc.status import from_rpc_error

RESULT = Path(__file__).with_name("results") / "overload.json"
GOAL = 0.9
PREFILL_WORKERS, TOKENS_PER_S, PROMPT_TOKENS = 2, 10_000, 1000
CAPACITY = PREFILL_WORKERS * TOKENS_PER_S / PROMPT_TOKENS
LOADS = (0.7, 1.0, 1.5, 3.0)
TENANTS = ("ada", "bob", "cyd", "dot")
WARM_UP_S = 3.0
NEW_TOKENS = 4
LATE = ("DEADLINE_EXCEEDED", "DEADLINE_UNREACHABLE")


@dataclass
class Outcome:
    """One request: when it was sent (s after the first), and what its client saw."""

    sent: float
    accepted: bool = False
    first_token_s: float | None = None
    expected_s: float | None = None
    queued_s: float | None = None
    refusal: str = ""
    refused_s: float = 0.0
    retry_s: float | None = None


@dataclass
class Client:
    """Sends as every tenant and keeps what came of it."""

    stub: Any
    keys: list[str]
    deadline_s: float
    outcomes: list[Outcome] = field(default_factory=list)
    number: int = 0

    async def load(self, rate: float, seconds: float, *, blind: bool = False) -> list[Outcome]:
        """An open loop for so many seconds, and what came of each request."""
        rng = Random(f"{rate}")
        begun = due = time.monotonic()
        outcomes: list[Outcome] = []
        asking = []
        while (due := due + rng.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(due - time.monotonic(), 0))
            outcome = Outcome(due - begun)
            outcomes.append(outcome)
            asking.append(asyncio.create_task(self._ask(outcome, due, rng, blind=blind)))
        await asyncio.gather(*asking)
        return outcomes

    async def _ask(self, outcome: Outcome, due: float, rng: Random, *, blind: bool) -> None:
        self.number += 1
        request = router_pb2.GenerateRequest(
            request_id=f"r{self.number}",
            model=MODEL,
            tokens=router_pb2.TokenInput(
                token_ids=[rng.randrange(4, 250) for _ in range(PROMPT_TOKENS)]
            ),
            sampling=sampling_pb2.Sampling(max_tokens=NEW_TOKENS),
        )
        if not blind:
            request.first_token_timeout_ms = round(self.deadline_s * 1000)
        call = self.stub.Generate(request, metadata=bearer(rng.choice(self.keys)), timeout=60)
        with suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self.deadline_s + 1):
                await self._read(call, outcome, due)
        call.cancel()

    async def _read(self, call: Any, outcome: Outcome, due: float) -> None:
        try:
            async for message in call:
                kind = message.WhichOneof("event")
                if kind == "accepted":
                    outcome.accepted = True
                    if message.accepted.HasField("expected_wait_ms"):
                        outcome.expected_s = message.accepted.expected_wait_ms / 1000
                elif kind == "chunk" and outcome.first_token_s is None:
                    outcome.first_token_s = time.monotonic() - due
                elif kind == "completed":
                    outcome.queued_s = message.completed.timing.queued_us / 1e6
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            outcome.refusal, outcome.retry_s = error.reason, error.retry_after_s
            outcome.refused_s = time.monotonic() - due


def quantile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[min(int(len(ordered) * share), len(ordered) - 1)], 3) if ordered else None


def row_of(name: str, load: float, outcomes: list[Outcome], client: Client) -> dict[str, Any]:
    counted = [each for each in outcomes if each.sent >= WARM_UP_S]
    seconds = max(each.sent for each in outcomes) - WARM_UP_S
    good = [
        each.first_token_s
        for each in counted
        if each.first_token_s is not None and each.first_token_s <= client.deadline_s
    ]
    refused = [each for each in counted if each.refusal and not each.accepted]
    retries = [each.retry_s for each in refused if each.retry_s is not None]
    errors = [
        abs(each.expected_s - each.queued_s)
        for each in counted
        if each.expected_s is not None and each.queued_s is not None
    ]
    return {
        "row": name,
        "load": load,
        "offered_per_s": round(len(counted) / seconds, 2),
        "goodput_per_s": round(len(good) / seconds, 2),
        "ttft_p50_s": quantile(good, 0.5),
        "refused": len(refused),
        "refused_with_retry_info": len(retries),
        "refused_ms_p95": round(1e3 * (quantile([each.refused_s for each in refused], 0.95) or 0)),
        "retry_s": [quantile(retries, 0), quantile(retries, 1)],
        "late": sum(each.accepted for each in counted) - len(good),
        "reasons": sorted({each.refusal for each in counted if each.refusal}),
        "wait_error_s_p50": quantile(errors, 0.5),
        "wait_error_s_p90": quantile(errors, 0.9),
    }


@asynccontextmanager
async def client_of(address: str, deadline_s: float) -> AsyncIterator[Client]:
    """Once the router sees all its workers."""
    async with grpc.aio.insecure_channel(address, options=SDK_CLIENT) as channel:
        caller = RouterCaller(channel)
        async with asyncio.timeout(60):
            while True:
                with suppress(grpc.aio.AioRpcError):
                    keys = [await caller.make_tenant(name) for name in TENANTS]
                    listed = await caller.stub.ListModels(
                        router_pb2.ListModelsRequest(), metadata=bearer(keys[0])
                    )
                    model = listed.models[0]
                    if model.prefill_workers == PREFILL_WORKERS and model.decode_workers:
                        break
                await asyncio.sleep(0.2)
        yield Client(cast(Any, caller.stub), keys, deadline_s)


async def measure(folder: Path, ledger: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    certs = folder / "certs"
    make_dev_certs(certs)
    write_byte_tokenizer(folder)

    configs = [
        MockConfig(worker_id=f"p{number}", role="prefill", prefill_tokens_per_s=TOKENS_PER_S)
        for number in range(PREFILL_WORKERS)
    ]
    configs.append(MockConfig(worker_id="d", role="decode", decode_step_s=0.01))
    rows = []
    async with mock_workers(partial(tls_files, certs), *configs) as processes:
        workers = [endpoint for each in processes for endpoint in each.endpoints]
        port = free_port()
        config = write_config(folder, "router", ledger=ledger, port=port, workers=workers)
        with python_process("services.router", "--config", str(config)):
            async with client_of(f"127.0.0.1:{port}", arguments.deadline) as client:
                seconds = WARM_UP_S + arguments.seconds
                for load in LOADS:
                    outcomes = await client.load(load * CAPACITY, seconds)
                    rows.append(row_of("deadline", load, outcomes, client))
                    print(json.dumps(rows[-1]), flush=True)
                outcomes = await client.load(LOADS[-1] * CAPACITY, seconds, blind=True)
                rows.append(row_of("blind", LOADS[-1], outcomes, client))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--deadline", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with ledger_redis() as (folder, server):
        rows = uvloop.run(measure(folder, server.url, arguments))
    goodputs = [row["goodput_per_s"] for row in rows if row["row"] == "deadline"]
    report = {
        "command": f"python -m benchmarks.serving.overload --seconds {arguments.seconds:g} "
        f"--deadline {arguments.deadline:g}",
        "commit": commit(),
        "device": device(),
        "capacity_per_s": CAPACITY,
        "deadline_s": arguments.deadline,
        "rows": rows,
        "at_3x_over_peak": round(goodputs[-1] / max(goodputs), 3),
        "blind_over_peak": round(rows[-1]["goodput_per_s"] / max(goodputs), 3),
        "goal": GOAL,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in report.items() if key != "rows"}, indent=2))


if __name__ == "__main__":
    main()
