"""What the router's relay carries on one core, against a relay that does nothing else.

    python -m benchmarks.serving.relay [--rounds 3] [--streams 256] [--seconds 4]

A real router process has core 0 for itself; mock workers, the ledger's Redis (AOF `always`) and the
client share core 1. The bare relay is a process with the same event loop and channels that passes
a worker's messages on as bytes: no key, no money, no text, no counting. It takes the router's place
on core 0 in turns (ABAB); figures are medians of the rounds. Rows:

- `uncoalesced`: one token a message, as fast as it goes, both relays. Rates by the clock and by the
  relay's own CPU time; the ratio that counts is the worse one.
- `coalesced`: chunks of 8 tokens from workers that step at 62k tokens/s in all. A chunk's delay is
  from the step that completed it to the client's read; a token's from its own step.
- `saturated`: chunks of 8 tokens, as fast as it goes.
- `unary`: a request for one token alone, to its first message: asked of the worker, through the
  bare relay and through the router. What the hold costs stands beside it (one INCR with fsync).
- `token`: one stream, a token each 5 ms: from the worker's step to the client's read.

Floor: a relayed message is one gRPC read and one write, which the bare relay does and no more. The
router reads the chunks of many attempts in one message, so its floor is lower: the write alone.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop
from redis.asyncio import Redis

from benchmarks.provenance import commit, device
from benchmarks.serving.ledger_redis import ledger_redis
from benchmarks.serving.router_process import python_process, tls_files, write_config
from services.router.worker_task import wire_id
from services.stack.ports import free_port
from tests.mock_worker import MockConfig
from tests.mock_workers import MockProcess
from tests.redis_process import RedisProcess
from tests.router_harness import (
    MODEL,
    RouterCaller,
    bearer,
    write_byte_tokenizer,
)
from tidemill.api.common.v1 import lifecycle_pb2, sampling_pb2
from tidemill.api.decode.v1 import decode_service_pb2 as decode_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.certs import make_dev_certs
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.options import PUBLIC_SERVER, SDK_CLIENT

RESULT = Path(__file__).with_name("results") / "relay.json"
GENERATE = "/tidemill.api.router.v1.RouterService/Generate"
DECODE = "/tidemill.api.decode.v1.DecodeService/Decode"
TENANT = "acme"
PROMPT = [9] * 64
CHUNK = 8
GOAL_TOKENS_PER_S = 60_000
OFFERED_TOKENS_PER_S = 62_000  # a step that a mock worker misses is lost
STEP_S = 0.005  # of the stream alone
WARM_UP_S = 0.5
STARTED = 3  # messages of a stream: a place, its first token, and more
CHANNELS = 4  # a router takes 256 streams a connection

Open = Callable[[str, int], Any]  # request id, most tokens -> an open call that reads bytes


async def serve_bare(certs: Path, port: int, worker: str) -> None:
    """Pass the request on to the worker, and each of its messages back."""
    channel = internal_channel(worker, role="decode", tls=tls_files(certs, "router"))
    decode: Any = channel.stream_stream(DECODE)

    async def generate(request: bytes, context: Any) -> None:
        call = decode()
        try:
            await call.write(request)
            await call.done_writing()
            while (message := await call.read()) is not grpc.aio.EOF:
                await context.write(message)
        finally:
            call.cancel()

    server = grpc.aio.server(options=PUBLIC_SERVER)
    handlers: dict[str, Any] = {"Generate": grpc.unary_stream_rpc_method_handler(generate)}
    name = GENERATE.split("/")[1]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all threads, in the kernel and out of it."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Heard:
    """What came of one stream, and when (time.monotonic)."""

    messages: list[bytes] = field(default_factory=list)
    at: "array[float]" = field(default_factory=lambda: array("d"))

    async def listen(self, call: Any) -> None:
        with suppress(asyncio.CancelledError):
            while (message := await call.read()) is not grpc.aio.EOF:
                self.at.append(time.monotonic())
                self.messages.append(message)


class Ends:
    """The client's side of the router and of the bare relay, and of a worker itself."""

    def __init__(self, certs: Path, worker: str, ports: dict[str, int], key: str) -> None:
        self._metadata = bearer(key)
        self._opened = 0
        self._public: dict[str, list[Any]] = {}
        self._channels: list[grpc.aio.Channel] = []
        options = (*SDK_CLIENT, ("grpc.use_local_subchannel_pool", 1))
        for name, port in ports.items():
            channels = [
                grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options)
                for _ in range(CHANNELS)
            ]
            self._channels += channels
            self._public[name] = [channel.unary_stream(GENERATE) for channel in channels]
        internal = internal_channel(worker, role="decode", tls=tls_files(certs, "router"))
        self._channels.append(internal)
        self._decode: Any = internal.stream_stream(DECODE)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    def router(self, name: str) -> Open:
        def call(request_id: str, max_tokens: int) -> Any:
            request = router_pb2.GenerateRequest(
                request_id=request_id,
                model=MODEL,
                tokens=router_pb2.TokenInput(token_ids=PROMPT),
                sampling=sampling_pb2.Sampling(max_tokens=max_tokens),
            )
            generate = self._next(self._public[name])
            return generate(request.SerializeToString(), metadata=self._metadata)

        return call

    def bare(self, request_id: str, max_tokens: int) -> Any:
        start = start_bytes(request_id, max_tokens)
        return self._next(self._public["bare"])(start)

    def direct(self, request_id: str, max_tokens: int) -> Any:
        async def one() -> AsyncIterator[bytes]:
            yield start_bytes(request_id, max_tokens)

        return self._decode(one())

    def _next(self, stubs: list[Any]) -> Any:
        self._opened += 1
        return stubs[self._opened % len(stubs)]


def start_bytes(request_id: str, max_tokens: int) -> bytes:
    """What a router would say to the worker."""
    task = lifecycle_pb2.WorkerTask(
        id=lifecycle_pb2.AttemptId(request_id=request_id, attempt=1, fence=1),
        tenant_id=TENANT,
        cache_scope=bytes(32),
        token_ids=PROMPT,
        sampling=lifecycle_pb2.ResolvedSampling(max_tokens=max_tokens),
    )
    return decode_pb2.DecodeRequest(start=decode_pb2.Start(task=task)).SerializeToString()


def tokens_of(message: bytes) -> range:
    """Which of its completion's tokens a router's message brings."""
    chunk = router_pb2.GenerateResponse.FromString(message).chunk
    return range(chunk.first_index, chunk.first_index + len(chunk.token_ids))


@dataclass(frozen=True)
class Window:
    """What passed in the middle of a run of many streams; `cpu` are the relay's seconds."""

    heard: dict[str, Heard]
    begun: float
    ended: float
    cpu: float

    def messages(self) -> Iterator[tuple[str, bytes, float]]:
        """Request id, message, instant of those that came in the window."""
        for request_id, heard in self.heard.items():
            for message, at in zip(heard.messages, heard.at, strict=True):
                if self.begun <= at < self.ended:
                    yield request_id, message, at

    def rates(self, *, of_router: bool) -> dict[str, float]:
        """Tokens a second, by the clock and by the relay's CPU; the CPU of one message."""
        messages = [message for _, message, _ in self.messages()]
        tokens = sum(len(tokens_of(each)) for each in messages) if of_router else len(messages)
        return {
            "tokens_per_s": tokens / (self.ended - self.begun),
            "tokens_per_cpu_s": tokens / self.cpu,
            "cpu_us_per_message": 1e6 * self.cpu / len(messages),
            "tokens_per_message": tokens / len(messages),
            "core_busy": self.cpu / (self.ended - self.begun),
        }


class Bench:
    """The rows; `pids` are the relays' processes."""

    def __init__(
        self, ends: Ends, mock: MockProcess, pids: dict[str, int], num_streams: int, seconds: float
    ) -> None:
        self.ends = ends
        self._mock = mock
        self._pids = pids
        self._num_streams = num_streams
        self._seconds = seconds
        self._runs = 0

    async def run(self, name: str, call: Open) -> Window:
        """So many streams at once, watched after a while for a while, then hung up on."""
        self._runs += 1
        ids = [f"{name}-{self._runs}-{number}" for number in range(self._num_streams)]
        calls = {each: call(each, 100_000) for each in ids}
        heard = {each: Heard() for each in ids}
        listening = [asyncio.create_task(heard[each].listen(calls[each])) for each in ids]
        async with asyncio.timeout(30):  # starting a stream costs more than a message
            while not all(len(each.messages) >= STARTED for each in heard.values()):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.05)
        await asyncio.sleep(WARM_UP_S)
        cpu, begun = cpu_s(self._pids[name]), time.monotonic()
        await asyncio.sleep(self._seconds)
        cpu, ended = cpu_s(self._pids[name]) - cpu, time.monotonic()
        for each in calls.values():
            each.cancel()
        await asyncio.gather(*listening)
        await self._until_idle()
        return Window(heard, begun, ended, cpu)

    async def paced(self, name: str) -> dict[str, float]:
        """The coalesced row."""
        step_s = self._num_streams / OFFERED_TOKENS_PER_S
        await self._mock.change(
            "w", decode_step_s=step_s, tokens_per_message=CHUNK, keeps_times=True
        )
        window = await self.run(name, self.ends.router(name))
        times = await self._mock.times()
        await self._mock.change("w", decode_step_s=0.0, keeps_times=False)
        chunks, tokens = [], []
        for request_id, message, at in window.messages():
            due = times[wire_id(TENANT, request_id)]
            indices = tokens_of(message)
            if indices:
                chunks.append(1e3 * (at - due[indices[-1]]))
                tokens += [1e3 * (at - due[index]) for index in indices]
        delays = {"chunk": chunks, "token": tokens}
        return {**window.rates(of_router=True)} | {
            f"{kind}_delay_ms_{quantile}": value
            for kind, values in delays.items()
            for quantile, value in percentiles(values).items()
        }

    async def unary(self, call: Open, request_id: str, *, of_router: bool) -> float:
        """Milliseconds until the first token of a request for one."""
        begun = time.monotonic()
        stream = call(request_id, 1)
        first = None
        while (message := await stream.read()) is not grpc.aio.EOF:
            if first is None and (not of_router or tokens_of(message)):
                first = time.monotonic()
        assert first is not None
        return 1e3 * (first - begun)

    async def token(
        self, call: Open, request_id: str, num_tokens: int, *, of_router: bool
    ) -> list[float]:
        """Milliseconds from each token's step to the client."""
        heard = Heard()
        await heard.listen(call(request_id, num_tokens))
        times = await self._mock.times()
        due = times[wire_id(TENANT, request_id) if of_router else request_id]
        if not of_router:  # the last message is Final
            return [1e3 * (at - due[index]) for index, at in enumerate(heard.at[1:-1], start=1)]
        return [
            1e3 * (at - due[indices[0]])
            for message, at in zip(heard.messages, heard.at, strict=True)
            if (indices := tokens_of(message)) and indices[0] > 0
        ]

    async def _until_idle(self) -> None:
        async with asyncio.timeout(20):
            while (await self._mock.counts())["w"].running:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.05)


def percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{p}": ordered[min(len(ordered) * p // 100, len(ordered) - 1)] for p in (50, 99)}


async def rows(
    bench: Bench, redis: Redis, rounds: int, number: int
) -> dict[str, list[dict[str, float]]]:
    """Each row's figures, one of a round."""
    ends, mock = bench.ends, bench._mock
    found: dict[str, list[dict[str, float]]] = {}

    def add(row: str, figures: dict[str, float]) -> None:
        found.setdefault(row, []).append(figures)

    for _ in range(rounds):
        await mock.change("w", tokens_per_message=1)
        window = await bench.run("bare", ends.bare)
        add("uncoalesced_bare", window.rates(of_router=False))
        window = await bench.run("single", ends.router("single"))
        add("uncoalesced", window.rates(of_router=True))
        add("coalesced", await bench.paced("router"))
        window = await bench.run("router", ends.router("router"))
        add("saturated", window.rates(of_router=True))
    ways: list[tuple[str, Open, bool]] = [
        ("direct", ends.direct, False),
        ("bare", ends.bare, False),
        ("router", ends.router("router"), True),
    ]
    spent: dict[str, list[float]] = {name: [] for name in ("direct", "bare", "router", "incr")}
    for each in range(number + 20):
        for name, call, of_router in ways:
            spent[name].append(await bench.unary(call, f"u-{name}-{each}", of_router=of_router))
        begun = time.monotonic()
        await redis.incr("bare")
        spent["incr"].append(1e3 * (time.monotonic() - begun))
    add("unary", {f"{name}_ms": statistics.median(values[20:]) for name, values in spent.items()})
    await mock.change("w", decode_step_s=STEP_S, tokens_per_message=1, keeps_times=True)
    delays: dict[str, float] = {}
    for name, call, of_router in ways:
        values = await bench.token(call, f"t-{name}", number, of_router=of_router)
        delays |= {f"{name}_ms_{at}": value for at, value in percentiles(values).items()}
    add("token", delays)
    return found


async def measure(
    folder: Path, ledger: RedisProcess, arguments: argparse.Namespace
) -> dict[str, Any]:
    certs = folder / "certs"
    make_dev_certs(certs)
    write_byte_tokenizer(folder)
    mock = MockProcess(lambda role: tls_files(certs, role), MockConfig(worker_id="w", role="both"))
    await mock.start()
    worker = mock.endpoints[0].partition("@")[2]
    names = {"router": CHUNK, "single": 1}
    ports = {name: free_port() for name in ("bare", *names)}
    redis = Redis.from_url(ledger.url)
    with ExitStack() as processes:
        processes.callback(mock.kill)
        bare = ("benchmarks.serving.relay", "--bare", str(certs), str(ports["bare"]), worker)
        pids = {"bare": processes.enter_context(python_process(*bare, core=0))}
        for name, coalesce in names.items():
            config = write_config(
                folder,
                name,
                ledger=ledger.url,
                port=ports[name],
                workers=mock.endpoints,
                coalesce_tokens=coalesce,
                own_cores=True,
            )
            router = ("services.router", "--config", str(config))
            pids[name] = processes.enter_context(python_process(*router, core=0))
        key = await first_key(ports["router"])
        await first_key(ports["single"])
        ends = Ends(certs, worker, ports, key)
        bench = Bench(ends, mock, pids, arguments.streams, arguments.seconds)
        found = await rows(bench, redis, arguments.rounds, arguments.number)
        await ends.close()
    await redis.aclose()
    return {
        row: {
            name: round(statistics.median(each[name] for each in figures), 3) for name in figures[0]
        }
        for row, figures in found.items()
    }


async def first_key(port: int) -> str:
    """A key of the tenant, once the router there serves."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=SDK_CLIENT) as channel:
        await channel.channel_ready()
        caller = RouterCaller(channel)
        caller.key = await caller.make_tenant(TENANT)
        request = router_pb2.GenerateRequest(request_id=f"first-{port}", model=MODEL, prompt="x")
        async with asyncio.timeout(20):
            while (await caller.generate(request)).error is not None:  # noqa: ASYNC110 - nor has it
                await asyncio.sleep(0.1)
        return caller.key


def verdicts(found: dict[str, dict[str, float]]) -> dict[str, float]:
    ours, bare = found["uncoalesced"], found["uncoalesced_bare"]
    unary, token = found["unary"], found["token"]
    added = {name: unary[f"{name}_ms"] - unary["direct_ms"] for name in ("bare", "router")}
    token_added = {
        name: token[f"{name}_ms_p50"] - token["direct_ms_p50"] for name in ("bare", "router")
    }
    ratios = {
        "uncoalesced_to_bare": min(
            ours[rate] / bare[rate] for rate in ("tokens_per_s", "tokens_per_cpu_s")
        ),
        "goal_uncoalesced_to_bare": 0.8,
        "coalesced_tokens_per_s": found["coalesced"]["tokens_per_s"],
        "goal_coalesced_tokens_per_s": GOAL_TOKENS_PER_S,
        "coalesced_chunk_delay_ms_p99": found["coalesced"]["chunk_delay_ms_p99"],
        "goal_coalesced_chunk_delay_ms_p99": 50.0,
        "unary_added_ms": added["router"],
        "unary_added_ms_bare": added["bare"],
        "unary_added_to_bare_without_incr": (added["router"] - unary["incr_ms"]) / added["bare"],
        "token_added_to_bare": token_added["router"] / token_added["bare"],
        "goal_added_to_bare": 2.0,
    }
    return {name: round(value, 3) for name, value in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--number", type=int, default=300, help="of requests, and tokens, alone")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        certs, port, worker = arguments.bare
        uvloop.run(serve_bare(Path(certs), int(port), worker))
        return
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with ledger_redis() as (folder, server):
        found = uvloop.run(measure(folder, server, arguments))
    options = f"--rounds {arguments.rounds} --streams {arguments.streams}"
    report = {
        "command": f"python -m benchmarks.serving.relay {options} --seconds {arguments.seconds:g}",
        "commit": commit(),
        "device": device(),
        "python": platform.python_version(),
        **found,
        "verdicts": verdicts(found),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
