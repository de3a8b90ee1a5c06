"""Fetch and store through the cache service, against a bare gRPC stream of the same bytes.

    python -m benchmarks.serving.cache_rpc [--rounds 7] [--megabytes 128]

Three processes on loopback with mutual TLS: this client, `services.cache`, and a server that does
nothing but send and count bytes, in messages of the same size under the same channel options.
Rounds alternate between the two (ABAB); the figures are medians, in GB/s of payload. The
service's figure includes a SHA-256 at each end, and for a store one more at rest; the row `sha256`
says what one of those costs in one thread.
"""

import argparse
import asyncio
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import UInt64Value

from benchmarks.provenance import ROOT, commit, device
from services.stack.ports import free_port
from tidemill.certs import make_dev_certs
from tidemill.kv.cache_client import CacheClient, CacheClientConfig, CacheNamespace
from tidemill.kv.pieces import PIECE_BYTES
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.options import INTERNAL_SERVER
from tidemill.rpc.tls import TlsFiles, server_credentials

RESULT = Path(__file__).with_name("results") / "cache_rpc.json"
# One block of models/demo's size, and of a full V3 in bfloat16: 64 tokens x 61 layers x 576 x 2.
BLOCK_BYTES = (120_000, 64 * 61 * 576 * 2)
PATIENT = CacheClientConfig(lookup_s=60, stall_s=60, fetch_s=600, store_s=600)

Timed = Callable[[], Awaitable[float]]


def tls_files(certs: Path, role: str) -> TlsFiles:
    return TlsFiles(cert=certs / f"{role}.pem", key=certs / f"{role}.key", ca=certs / "ca.pem")


def message_sizes(block_bytes: int) -> list[int]:
    """How a block is cut, by the service and by the bare stream alike."""
    sizes = [PIECE_BYTES] * (block_bytes // PIECE_BYTES)
    return [*sizes, block_bytes % PIECE_BYTES] if block_bytes % PIECE_BYTES else sizes


async def serve_bare(certs: Path, port: int) -> None:
    """Send("<blocks> <block bytes>") -> that many bytes; Receive(stream of bytes) -> their sum."""

    async def send(request: bytes, _: Any) -> AsyncIterator[bytes]:
        num_blocks, block_bytes = map(int, request.split())
        messages = [bytes(size) for size in message_sizes(block_bytes)]
        for _ in range(num_blocks):
            for message in messages:
                yield message

    async def receive(requests: AsyncIterator[bytes], _: Any) -> bytes:
        total = 0
        async for message in requests:
            total += len(message)
        return UInt64Value(value=total).SerializeToString()

    server = grpc.aio.server(options=INTERNAL_SERVER)
    handlers: dict[str, Any] = {
        "Send": grpc.unary_stream_rpc_method_handler(send),
        "Receive": grpc.stream_unary_rpc_method_handler(receive),
    }
    server.add_registered_method_handlers("bare", handlers)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    credentials = server_credentials(tls_files(certs, "cache"), client_certs=True)
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    await server.wait_for_termination()


class Bare:
    """The client's side of the bare streams."""

    def __init__(self, channel: grpc.aio.Channel, num_blocks: int, block_bytes: int) -> None:
        self._send: Any = channel.unary_stream("/bare/Send")
        self._receive: Any = channel.stream_unary("/bare/Receive")
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes

    async def fetch(self) -> float:
        begun = time.perf_counter()
        total = 0
        async for message in self._send(f"{self._num_blocks} {self._block_bytes}".encode()):
            total += len(message)
        seconds = time.perf_counter() - begun
        assert total == self._num_blocks * self._block_bytes
        return seconds

    async def store(self) -> float:
        messages = [bytes(size) for size in message_sizes(self._block_bytes)]

        async def requests() -> AsyncIterator[bytes]:
            for _ in range(self._num_blocks):
                for message in messages:
                    yield message

        begun = time.perf_counter()
        answer = UInt64Value.FromString(await self._receive(requests()))
        seconds = time.perf_counter() - begun
        assert answer.value == self._num_blocks * self._block_bytes
        return seconds


class Ours:
    """The same through CacheClient and the service. Every store is of blocks not yet held."""

    def __init__(self, client: CacheClient, num_blocks: int, block_bytes: int) -> None:
        self._client = client
        self._payloads = [os.urandom(block_bytes) for _ in range(num_blocks)]
        self._hashes: list[bytes] = []
        self._namespace = CacheNamespace("bench", b"s" * 32, b"l" * 32, "bench")

    async def store(self) -> float:
        self._hashes = [os.urandom(32) for _ in self._payloads]
        blocks = list(zip(self._hashes, self._payloads, strict=True))
        begun = time.perf_counter()
        result = await self._client.store(self._namespace, blocks)
        seconds = time.perf_counter() - begun
        assert result.stored == len(blocks), result
        return seconds

    async def fetch(self) -> float:
        begun = time.perf_counter()
        found = [block.payload async for block in self._client.fetch(self._namespace, self._hashes)]
        seconds = time.perf_counter() - begun
        assert found == self._payloads
        return seconds


async def median_rates(
    timed: dict[str, Timed], num_bytes: int, rounds: int
) -> dict[str, dict[str, float]]:
    """GB/s of each, the rounds interleaved; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, run in timed.items():
            spent = await run()
            if number:
                seconds[name].append(spent)
    return {
        name: {
            "median": num_bytes / statistics.median(spent) / 1e9,
            "best": num_bytes / min(spent) / 1e9,
            "worst": num_bytes / max(spent) / 1e9,
        }
        for name, spent in seconds.items()
    }


async def measure(certs: Path, ports: tuple[int, int], rounds: int, total: int) -> list[Any]:
    tls = tls_files(certs, "prefill")
    ours_at, bare_at = (f"127.0.0.1:{port}" for port in ports)
    bare_channel = internal_channel(bare_at, role="cache", tls=tls)
    client = CacheClient(internal_channel(ours_at, role="cache", tls=tls), PATIENT)
    rows: list[Any] = []
    for block_bytes in BLOCK_BYTES:
        num_blocks = max(total // block_bytes, 1)
        bare, ours = (
            Bare(bare_channel, num_blocks, block_bytes),
            Ours(client, num_blocks, block_bytes),
        )
        for verb in ("store", "fetch"):
            timed = {"ours": getattr(ours, verb), "bare": getattr(bare, verb)}
            rates = await median_rates(timed, num_blocks * block_bytes, rounds)
            ratio = rates["ours"]["median"] / rates["bare"]["median"]
            rows.append({"verb": verb, "block_bytes": block_bytes, "gb_s": rates, "ratio": ratio})
            print(
                f"{verb:6} {block_bytes:>8} B blocks: ours {rates['ours']['median']:.3f} GB/s, "
                f"bare stream {rates['bare']['median']:.3f} GB/s, ratio {ratio:.2f}"
            )
    await client.close()
    await bare_channel.close()
    return rows


def sha256_rate() -> float:
    payload = bytes(BLOCK_BYTES[-1])
    begun = time.perf_counter()
    for _ in range(32):
        hashlib.sha256(payload).digest()
    return 32 * len(payload) / (time.perf_counter() - begun) / 1e9


@contextmanager
def servers(directory: Path, capacity_bytes: int) -> Iterator[tuple[int, int]]:
    """The cache service and the bare server as processes; their ports."""
    make_dev_certs(directory)
    ports = (free_port(), free_port())
    config = directory / "bench.toml"
    config.write_text(
        f"[cache]\ncapacity_bytes = {capacity_bytes}\n"
        f'[cache.server]\naddress = "127.0.0.1:{ports[0]}"\n'
        '[cache.server.tls]\ncert = "cache.pem"\nkey = "cache.key"\nca = "ca.pem"\n'
    )
    here = [sys.executable, "-m", "benchmarks.serving.cache_rpc", "--bare-port", str(ports[1])]
    commands = [
        [sys.executable, "-m", "services.cache", "--config", str(config)],
        [*here, "--certs", str(directory)],
    ]
    started = [
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) for command in commands
    ]
    try:
        yield ports
    finally:
        for process in started:
            process.terminate()
            process.wait(20)


async def until_up(certs: Path, ports: tuple[int, ...], *, role: str = "cache") -> None:
    tls = tls_files(certs, "prefill")
    for port in ports:
        channel = internal_channel(f"127.0.0.1:{port}", role=role, tls=tls)
        await asyncio.wait_for(channel.channel_ready(), 60)
        await channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=128, help="payload per round")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--bare-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--certs", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare_port is not None:
        asyncio.run(serve_bare(arguments.certs, arguments.bare_port))
        return
    total = arguments.megabytes * 1_000_000

    async def bench(directory: Path, ports: tuple[int, int]) -> list[Any]:
        await until_up(directory, ports)
        return await measure(directory, ports, arguments.rounds, total)

    with tempfile.TemporaryDirectory() as name, servers(Path(name), 4 * total) as ports:
        rows = asyncio.run(bench(Path(name), ports))
    report = {
        "command": f"python -m benchmarks.serving.cache_rpc --rounds {arguments.rounds} "
        f"--megabytes {arguments.megabytes}",
        "commit": commit(),
        "device": device(),
        "grpc": grpc.__version__,
        "python": platform.python_version(),
        "sha256_gb_s": sha256_rate(),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"sha256 {report['sha256_gb_s']:.2f} GB/s in one thread; written to {arguments.out}")


if __name__ == "__main__":
    main()
