"""Where the time to a first message goes in a router, stage by stage.

    python -m benchmarks.serving.first_message [--number 300]

The row `unary` of benchmarks.serving.relay, with the same processes on the same cores: a request
for one token is asked of a mock worker, through a bare relay and through the router, in turns, with
one INCR with fsync beside them. Then the same router again with a note at the start of each stage
(about 1 us each): medians, in microseconds since the client called.

Floor: the bare relay and one INCR. What the router does before the hold is on its way and after the
ledger's answer is Python on one core, whose caches other processes have filled since the last
request: code runs here two to eight times as long as in a loop of its own.
"""

import argparse
import asyncio
import functools
import json
import os
import platform
import signal
import statistics
import sys
import time
from bisect import bisect_left, bisect_right
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import uvloop
from redis.asyncio import Redis

from benchmarks.provenance import commit, device
from benchmarks.serving.ledger_redis import ledger_redis
from benchmarks.serving.relay import CHUNK, Ends, Open, first_key, tokens_of
from benchmarks.serving.router_process import python_process, tls_files, write_config
from services.router.__main__ import main as router_main
from services.stack.ports import free_port
from tests.mock_worker import MockConfig
from tests.mock_workers import MockProcess
from tests.redis_process import RedisProcess
from tests.router_harness import write_byte_tokenizer
from tidemill.certs import make_dev_certs

RESULT = Path(__file__).with_name("results") / "first_message.json"
WARM_UP = 20
POLL_S = 0.1

# What begins there: where it is, owner and attribute. Only a request's first of each counts.
STAGES = {
    "call arrived": ("tidemill.rpc.interceptors", "CallInterceptor", "intercept_service"),
    "guards": ("tidemill.rpc.interceptors", "_Entered", "__aenter__"),
    "request read": ("tidemill.rpc.interceptors", None, "only"),
    "validated": ("services.router.service", None, "validate"),
    "translated": ("services.router.service", None, "ask_of"),
    "tokens and chain": ("services.router.admission", "Admission", "admit"),
    "place in the queue": ("services.router.dispatch", "Dispatcher", "enqueue"),
    "hold sized": ("services.router.money.treasury", "Treasury", "open"),
    "hold packed": ("services.router.money.batches", "Batches", "send"),
    "hold sent": ("services.router.money.line", "Line", "ask"),
    "workers chosen": ("services.router.dispatch", "Dispatcher", "_place"),
    "hold there": ("services.router.money.treasury", None, "decode_reserve"),
    "worker called": ("services.router.attempt", "Attempt", "__init__"),
    "client told of its place": ("services.router.messages", "EventWriter", "message"),
    "worker has answered": ("services.router.serving", "Serving", "_take"),
    "first token written": ("services.router.messages", "EventWriter", "_chunk"),
}


def note_stages(notes: list[tuple[str, float]]) -> None:
    """From now on every stage of this process is noted as it begins, with the instant."""

    def noting(real: Any, stage: str) -> Any:
        @functools.wraps(real)
        def noted(*arguments: Any, **options: Any) -> Any:
            notes.append((stage, time.monotonic()))
            return real(*arguments, **options)

        return noted

    for stage, (module, owner, name) in STAGES.items():
        holder = import_module(module)
        if owner is not None:
            holder = getattr(holder, owner)
        setattr(holder, name, noting(getattr(holder, name), stage))


def serve_router(config: str, path: Path) -> None:
    """A router that keeps its notes in a file."""
    notes: list[tuple[str, float]] = []
    note_stages(notes)
    sys.argv = ["router", "--config", config]
    try:
        router_main()
    finally:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(notes), encoding="utf-8")
        part.rename(path)


async def first_token(call: Open, request_id: str, *, of_router: bool) -> tuple[float, float]:
    """When a request for one token was called, and when that came; read to its end."""
    begun = time.monotonic()
    stream, first = call(request_id, 1), None
    while (message := await stream.read()) is not grpc.aio.EOF:
        if first is None and (not of_router or tokens_of(message)):
            first = time.monotonic()
    assert first is not None
    return begun, first


async def turns(ends: Ends, redis: Redis, number: int) -> dict[str, float]:
    """Milliseconds to the first token by each way, and of an INCR."""
    ways: list[tuple[str, Open, bool]] = [
        ("direct", ends.direct, False),
        ("bare", ends.bare, False),
        ("router", ends.router("router"), True),
    ]
    spent: dict[str, list[float]] = {name: [] for name in ("direct", "bare", "router", "incr")}
    for each in range(number + WARM_UP):
        for name, call, of_router in ways:
            begun, first = await first_token(call, f"{name}-{each}", of_router=of_router)
            spent[name].append(1e3 * (first - begun))
        begun = time.monotonic()
        await redis.incr("bare")
        spent["incr"].append(1e3 * (time.monotonic() - begun))
    return {f"{name}_ms": statistics.median(took[WARM_UP:]) for name, took in spent.items()}


async def staged(ends: Ends, redis: Redis, number: int) -> list[tuple[float, float]]:
    """Requests to the router that takes notes, among the same others: begun, first token."""
    asked = []
    for each in range(number + WARM_UP):
        await first_token(ends.bare, f"beside-{each}", of_router=False)
        asked.append(await first_token(ends.router("noted"), f"noted-{each}", of_router=True))
        await redis.incr("bare")
    return asked[WARM_UP:]


def stages_of(asked: list[tuple[float, float]], notes: list[tuple[str, float]]) -> dict[str, float]:
    """Microseconds from the client's call to the start of each stage, and to its first token."""
    instants = [at for _, at in notes]
    since: dict[str, list[float]] = {}
    for begun, first in asked:
        seen = dict(reversed(notes[bisect_left(instants, begun) : bisect_right(instants, first)]))
        for stage, at in {**seen, "client has it": first}.items():
            since.setdefault(stage, []).append(1e6 * (at - begun))
    medians = {stage: statistics.median(values) for stage, values in since.items()}
    return dict(sorted(medians.items(), key=lambda each: each[1]))


async def measure(folder: Path, ledger: RedisProcess, number: int) -> dict[str, dict[str, float]]:
    certs, notes = folder / "certs", folder / "notes.json"
    make_dev_certs(certs)
    write_byte_tokenizer(folder)
    mock = MockProcess(lambda role: tls_files(certs, role), MockConfig(worker_id="w", role="both"))
    await mock.start()
    worker = mock.endpoints[0].partition("@")[2]
    ports = {name: free_port() for name in ("bare", "router", "noted")}
    redis = Redis.from_url(ledger.url)
    with ExitStack() as processes:
        processes.callback(mock.kill)
        bare = ("benchmarks.serving.relay", "--bare", str(certs), str(ports["bare"]), worker)
        processes.enter_context(python_process(*bare, core=0))
        router = {}
        for name in ("router", "noted"):
            router[name] = write_config(
                folder,
                name,
                ledger=ledger.url,
                port=ports[name],
                workers=mock.endpoints,
                coalesce_tokens=CHUNK,
            )
        plain = ("services.router", "--config", str(router["router"]))
        processes.enter_context(python_process(*plain, core=0))
        key = await first_key(ports["router"])
        ends = Ends(certs, worker, ports, key)
        unary = await turns(ends, redis, number)
        noted = ("benchmarks.serving.first_message", "--noted", str(router["noted"]), str(notes))
        pid = processes.enter_context(python_process(*noted, core=0))
        await first_key(ports["noted"])
        asked = await staged(ends, redis, number)
        await ends.close()
        os.kill(pid, signal.SIGTERM)
        while not notes.exists():  # noqa: ASYNC110 - it is a process
            await asyncio.sleep(POLL_S)
    await redis.aclose()
    taken = [(str(stage), float(at)) for stage, at in json.loads(notes.read_text("utf-8"))]
    return {"unary": unary, "stages_us": stages_of(asked, taken)}


def verdicts(unary: dict[str, float]) -> dict[str, float]:
    added = {name: unary[f"{name}_ms"] - unary["direct_ms"] for name in ("bare", "router")}
    return {
        "added_ms_bare": added["bare"],
        "added_ms_router": added["router"],
        "added_to_bare_without_incr": (added["router"] - unary["incr_ms"]) / added["bare"],
        "goal_added_to_bare": 2.0,
    }


def rounded(figures: dict[str, float], digits: int) -> dict[str, float]:
    return {name: round(value, digits) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=300, help="of requests by each way")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--noted", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.noted:
        config, path = arguments.noted
        serve_router(config, Path(path))
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with ledger_redis() as (folder, server):
        found = uvloop.run(measure(folder, server, arguments.number))
    report = {
        "command": f"python -m benchmarks.serving.first_message --number {arguments.number}",
        "commit": commit(),
        "device": device(),
        "python": platform.python_version(),
        "unary": rounded(found["unary"], 3),
        "stages_us": rounded(found["stages_us"], 0),
        "verdicts": rounded(verdicts(found["unary"]), 3),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
