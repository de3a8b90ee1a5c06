"""A follow-up turn prefilled where it is decoded, or handed over: its TTFT, and others' ITL.

    python -m benchmarks.serving.in_place [--prefix 1024] [--rests 16,64,256] [--rounds 7]

A prefill and a decode worker over models/demo, a process and a thread each, which share memory.
While `--streams` sequences decode, a conversation's next turn comes: the prefix lies on both
workers, the rest is new. Both ways take turns in one run, each time with a fresh conversation.

- `ttft_ms`: median from Start sent until PrefillDone.
- `itl_ms`: the longest gap between two tokens of each running sequence from Start until the turn's
  second token, when its prefill no longer weighs on anybody; median over rounds of the worst.
- `undisturbed_itl_ms`: the same over as long a time without a turn, the floor of ITL.
- `floor_ms`: the TTFT in place of a rest of one token, one step of the engine: the floor of TTFT.

`measured_tokens` is how many the worker, by its own warm-up, would prefill in place with the
default of `in_place_stall_s`. What in place gains is in TTFT; what it costs is in ITL, and grows
with the rest: that is why it has a limit.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, cast

import torch

from benchmarks.provenance import ROOT, commit, device
from services.stack import toml
from tests.worker_harness import Attempted, RouterSide
from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, ResolvedSampling, WorkerTask
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.api.worker.v1 import worker_service_pb2 as worker_pb2
from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tidemill.certs import make_dev_certs
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.tls import TlsFiles

RESULT = Path(__file__).with_name("results") / "in_place.json"
ROLES = ("prefill", "decode")
VOCABULARY = range(10, 4000)
STREAM_TOKENS = 3000


class Bench:
    """Two workers as a router sees them, and the sequences that decode meanwhile."""

    def __init__(self, addresses: dict[str, str], tls: TlsFiles) -> None:
        self.channel = internal_channel(addresses["decode"], role="decode", tls=tls)
        self.router = RouterSide(self.channel)
        self.rng = Random(0)
        self._target = pb.PrefillTarget(worker_id="prefill", address=addresses["prefill"])
        self._number = 0
        self._streams: list[asyncio.Task[None]] = []
        self._arrivals: list[list[float]] = []

    def tokens(self, count: int) -> list[int]:
        return self.rng.choices(VOCABULARY, k=count)

    def start(self, tokens: list[int], *, in_place: bool, max_tokens: int) -> pb.Start:
        self._number += 1
        start = pb.Start(
            task=WorkerTask(
                id=AttemptId(request_id=f"r{self._number}", attempt=1, fence=1),
                tenant_id="benchmark",
                cache_scope=b"s" * 32,
                token_ids=tokens,
                sampling=ResolvedSampling(top_p=1.0, max_tokens=max_tokens, min_tokens=max_tokens),
            )
        )
        if not in_place:
            start.prefill.CopyFrom(self._target)
        return start

    async def decode_meanwhile(self, num_streams: int) -> None:
        """Sequences that decode until `stop`."""
        self._arrivals = [[] for _ in range(num_streams)]
        for arrived in self._arrivals:
            start = self.start(self.tokens(64), in_place=False, max_tokens=STREAM_TOKENS)
            attempted = await self.router.begin(start, timeout=600)
            await attempted.until("chunk")
            self._streams.append(asyncio.create_task(follow(attempted, arrived)))

    async def stop(self) -> None:
        for stream in self._streams:
            stream.cancel()
            with suppress(asyncio.CancelledError):
                await stream
        await self.channel.close()

    def longest_gap(self, begun: float, ended: float) -> float:
        """Between two tokens of one running sequence, any of it in that time, in ms."""
        gaps = [
            after - before
            for arrived in self._arrivals
            for before, after in pairwise(arrived)
            if after >= begun and before <= ended
        ]
        return 1e3 * max(gaps)

    async def turn(self, prefix: int, rest: int, *, in_place: bool) -> dict[str, float]:
        """A fresh conversation's second turn."""
        first = self.tokens(prefix)
        await self.router.ask(self.start(first, in_place=False, max_tokens=1))
        await asyncio.sleep(0.1)
        turn = self.start(first + self.tokens(rest), in_place=in_place, max_tokens=8)
        begun = time.perf_counter()
        attempted = await self.router.begin(turn)
        await attempted.until("prefill_done")
        ttft = time.perf_counter() - begun
        await attempted.until("chunk")
        ended = time.perf_counter()
        answer = await attempted.finish()
        assert answer.usage.computed_tokens == rest, answer.usage
        await asyncio.sleep(0.1)
        return {"ttft_ms": 1e3 * ttft, "itl_ms": self.longest_gap(begun, ended)}

    async def quiet(self, seconds: float) -> float:
        begun = time.perf_counter()
        await asyncio.sleep(seconds)
        return self.longest_gap(begun, time.perf_counter() - 0.05)

    async def measured_tokens(self) -> int:
        stub = cast(Any, WorkerServiceStub(self.channel))
        answer = await stub.DescribeWorker(worker_pb2.DescribeWorkerRequest())
        return int(answer.in_place_tokens)


async def follow(attempted: Attempted, arrived: list[float]) -> None:
    while await attempted.next() is not None:
        arrived.append(time.perf_counter())


@asynccontextmanager
async def workers(
    folder: Path, model: Path, in_place_tokens: int | None
) -> AsyncIterator[tuple[dict[str, str], TlsFiles]]:
    """Both roles as processes; address by role, and the router's certificate."""
    certs, shared = folder / "certs", folder / "shm"
    make_dev_certs(certs)
    shared.mkdir(mode=0o700)
    processes, addresses = [], {}
    for role in ROLES:
        files = {"cert": certs / f"{role}.pem", "key": certs / f"{role}.key"}
        settings = {
            "worker_id": role,
            "model": "demo",
            "model_dir": model,
            "in_place_tokens": in_place_tokens,
            "engine": {"num_blocks": 512, "num_threads": 1},
            "handover": {"shm_dir": shared},
            "server": {"address": "127.0.0.1:0", "tls": {**files, "ca": certs / "ca.pem"}},
        }
        config = folder / f"{role}.toml"
        config.write_text(toml.dumps({role: settings}), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"services.{role}", "--config", str(config)),
            cwd=ROOT,
            stderr=asyncio.subprocess.PIPE,
        )
        processes.append(process)
    try:
        for role, process in zip(ROLES, processes, strict=True):
            addresses[role] = await _address(process)
        router = TlsFiles(cert=certs / "router.pem", key=certs / "router.key", ca=certs / "ca.pem")
        yield addresses, router
    finally:
        for process in processes:
            process.terminate()
        await asyncio.gather(*(process.communicate() for process in processes))


async def _address(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    async for line in process.stderr:
        with suppress(ValueError):
            record = json.loads(line)
            if record.get("message") == "serving":
                return str(record["address"])
    raise RuntimeError("a worker ended before it served")


async def measure(addresses: dict[str, str], tls: TlsFiles, arguments: Any) -> list[dict[str, Any]]:
    bench = Bench(addresses, tls)
    await bench.decode_meanwhile(arguments.streams)
    samples: dict[str, list[dict[str, float]]] = {}
    undisturbed: list[float] = []
    for number in range(arguments.rounds + 1):
        for rest in (1, *arguments.rests):
            for in_place in (True, False):
                sample = await bench.turn(arguments.prefix, rest, in_place=in_place)
                if number:
                    samples.setdefault(f"{rest} {in_place}", []).append(sample)
        undisturbed.append(await bench.quiet(0.2))
    await bench.stop()

    def median(rest: int, in_place: bool, figure: str) -> float:
        return round(statistics.median(each[figure] for each in samples[f"{rest} {in_place}"]), 1)

    rows = []
    for rest in arguments.rests:
        row: dict[str, Any] = {"rest_tokens": rest}
        for way, in_place in (("in_place", True), ("handed_over", False)):
            for figure in ("ttft_ms", "itl_ms"):
                row[f"{way}_{figure}"] = median(rest, in_place, figure)
        row["ttft_ratio"] = round(row["in_place_ttft_ms"] / row["handed_over_ttft_ms"], 3)
        row["itl_ratio"] = round(row["in_place_itl_ms"] / row["handed_over_itl_ms"], 3)
        row["floor_ms"] = median(1, True, "ttft_ms")
        row["undisturbed_itl_ms"] = round(statistics.median(undisturbed), 1)
        rows.append(row)
    return rows


async def run(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    model = arguments.model.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        async with workers(Path(scratch), model, None) as (addresses, tls):
            bench = Bench(addresses, tls)
            measured = await bench.measured_tokens()
            await bench.stop()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        async with workers(Path(scratch), model, max(arguments.rests)) as (addresses, tls):
            return await measure(addresses, tls, arguments), measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--rests", type=lambda text: list(map(int, text.split(","))), default=None)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    arguments.rests = arguments.rests or [16, 64, 256]
    rows, measured = asyncio.run(run(arguments))
    report = {
        "command": f"python -m benchmarks.serving.in_place --prefix {arguments.prefix} "
        f"--rests {','.join(map(str, arguments.rests))} --streams {arguments.streams} "
        f"--rounds {arguments.rounds}",
        "commit": commit(),
        "device": device(),
        "torch": torch.__version__,
        "model": arguments.model.name,
        "measured_tokens": measured,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"measured at the start: at most {measured} tokens in place")
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
