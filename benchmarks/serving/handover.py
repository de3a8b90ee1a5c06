"""Latents from a prefill worker's pool into a decode worker's, by each transport.

    python -m benchmarks.serving.handover [--rounds 7] [--tokens 2048]

Two processes on one host with mutual TLS, all layers ready from the start, rounds that take turns
(ABAB); figures are medians in GB/s of latents. The shape is a full V3's: 61 layers of 576 bfloat16
a token.

    grpc     pool -> segments with xxh3 -> PullKv in messages of 2 MiB -> verified -> pool
    shm      pool -> shared memory with xxh3 -> pool, verified; PullKv says only where
    bare     as many bytes in messages of the same size, sent and counted and nothing else
    memcpy   one process copies as many bytes once: the floor of anything that copies

What to expect. shm: each side copies once and hashes what it copied while that is in its cache, the
two sides overlap; so at most 1 / (1/memcpy + 1/xxh3) where both have a core and memory keeps up
with two copies at once. grpc: a byte is copied into the message, into gRPC's buffer, encrypted, and
the same again on the other side, where `bare` has half of that and no hash: at most `bare`.
"""

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import torch
import xxhash

from benchmarks.provenance import ROOT, commit, device
from benchmarks.serving.cache_rpc import (
    Timed,
    median_rates,
    tls_files,
    until_up,
)
from services.stack.ports import free_port
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tidemill.certs import make_dev_certs
from tidemill.engine import BlockPool, KvLayout
from tidemill.kv.handover import Handover, HandoverState, HandoverTable
from tidemill.kv.segments import Landing
from tidemill.kv.shm import SharedMemory
from tidemill.kv.threads import in_thread, one_ahead
from tidemill.kv.transport import GrpcKvTransport, KvSource
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.options import INTERNAL_SERVER
from tidemill.rpc.tls import server_credentials

RESULT = Path(__file__).with_name("results") / "handover.json"
MESSAGE_BYTES = 2 << 20
REF = pb.HandoverRef(handover_id=b"h" * 16, epoch=1)
LAYERS, LATENT_DIM = 61, 576
LAYOUT = KvLayout(
    dtype="bfloat16", num_layers=LAYERS, latent_dim=LATENT_DIM, model_digest=b"b" * 32
)


def make_pool(num_tokens: int) -> BlockPool:
    return BlockPool(
        num_layers=LAYERS,
        num_blocks=-(-num_tokens // 64),
        latent_dim=LATENT_DIM,
        dtype=torch.bfloat16,
    )


class Source:
    """A prefill worker all of whose latents are computed."""

    def __init__(self, num_tokens: int, shm_dir: Path) -> None:
        self._pool = make_pool(num_tokens)
        self._pool.latents.normal_()
        self._num_tokens = num_tokens
        self._table = HandoverTable(epoch=1, lease_s=600.0, clock=time.monotonic)
        windows = SharedMemory(shm_dir).windows
        self._source = KvSource(self._pool, LAYOUT, self._table, windows=windows)

    async def pull_kv(self, request: pb.PullKvRequest, _context: Any) -> AsyncIterator[bytes]:
        handover = Handover(
            block_table=range(self._pool.num_blocks),
            num_layers=LAYERS,
            first_token=0,
            num_tokens=self._num_tokens,
            on_close=lambda _: None,
        )
        self._table.offer(handover)
        for layer in range(LAYERS):
            handover.ready(layer, 0, self._num_tokens)
        messages = self._source.stream(
            handover,
            max_message_bytes=request.max_message_bytes,
            shm=request.shm if request.HasField("shm") else None,
        )
        async for packed in one_ahead(messages):
            yield packed.message
        self._table.close(handover, HandoverState.RELEASED)


async def send_bare(request: bytes, _context: Any) -> AsyncIterator[bytes]:
    left = int(request)
    message = bytes(MESSAGE_BYTES)
    while left > 0:
        yield message[:left]
        left -= len(message)


async def serve(certs: Path, shm_dir: Path, port: int, num_tokens: int) -> None:
    torch.set_num_threads(1)
    server = grpc.aio.server(options=INTERNAL_SERVER)
    pull: Any = grpc.unary_stream_rpc_method_handler(
        Source(num_tokens, shm_dir).pull_kv,
        request_deserializer=pb.PullKvRequest.FromString,
    )
    services: dict[str, dict[str, Any]] = {
        "tidemill.api.prefill.v1.PrefillService": {"PullKv": pull},
        "bare": {"Send": grpc.unary_stream_rpc_method_handler(send_bare)},
    }
    handlers = [grpc.method_handlers_generic_handler(*each) for each in services.items()]
    server.add_generic_rpc_handlers(tuple(handlers))
    credentials = server_credentials(tls_files(certs, "prefill"), client_certs=True)
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    await server.wait_for_termination()


class Puller:
    """The decode worker's side."""

    def __init__(self, channel: grpc.aio.Channel, num_tokens: int, shm_dir: Path) -> None:
        stub: Any = PrefillServiceStub(channel)
        self._transport = GrpcKvTransport(stub, max_message_bytes=MESSAGE_BYTES)
        self._bare: Any = channel.unary_stream("/bare/Send")
        self._pool = make_pool(num_tokens)
        self._num_tokens = num_tokens
        self.shared = SharedMemory(shm_dir)
        self.num_bytes = LAYOUT.block_bytes // 64 * num_tokens
        self._from = torch.ones(self.num_bytes, dtype=torch.uint8)
        self._to = torch.zeros(self.num_bytes, dtype=torch.uint8)

    async def grpc(self) -> float:
        landing = self._landing()
        begun = time.perf_counter()
        async for segments in one_ahead(self._transport.pull(REF, timeout_s=600.0)):
            await in_thread(landing.write, segments)
        landing.check_complete()
        return time.perf_counter() - begun

    async def shm(self) -> float:
        landing = self._landing()
        arenas = self.shared.arenas
        begun = time.perf_counter()
        arena = await in_thread(arenas.lend, landing.shared.num_bytes)
        target = pb.ShmTarget(name=arena.name, num_bytes=arena.num_bytes)
        async for segments in one_ahead(self._transport.pull(REF, timeout_s=600.0, shm=target)):
            await in_thread(landing.write, segments, arena.memory)
        arenas.give_back(arena, reusable=True)
        landing.check_complete()
        return time.perf_counter() - begun

    async def bare(self) -> float:
        begun = time.perf_counter()
        total = 0
        async for message in self._bare(str(self.num_bytes).encode()):
            total += len(message)
        seconds = time.perf_counter() - begun
        assert total == self.num_bytes
        return seconds

    async def memcpy(self) -> float:
        begun = time.perf_counter()
        self._to.copy_(self._from)
        return time.perf_counter() - begun

    def xxh3_gb_s(self) -> float:
        """Hashing what is in the core's cache, one thread."""
        warm = bytes(256 << 10)
        begun = time.perf_counter()
        for _ in range(1000):
            xxhash.xxh3_64_intdigest(warm)
        return 1000 * len(warm) / (time.perf_counter() - begun) / 1e9

    def _landing(self) -> Landing:
        blocks = range(self._pool.num_blocks)
        return Landing(self._pool, LAYOUT, blocks, first_token=0, num_tokens=self._num_tokens)


async def measure(
    certs: Path, shm_dir: Path, port: int, num_tokens: int, rounds: int
) -> dict[str, Any]:
    torch.set_num_threads(1)
    await until_up(certs, (port,), role="prefill")
    tls = tls_files(certs, "decode")
    channel = internal_channel(f"127.0.0.1:{port}", role="prefill", tls=tls)
    puller = Puller(channel, num_tokens, shm_dir)
    timed: dict[str, Timed] = {
        "grpc": puller.grpc,
        "bare": puller.bare,
        "shm": puller.shm,
        "memcpy": puller.memcpy,
    }
    rates = await median_rates(timed, puller.num_bytes, rounds)
    await channel.close()
    puller.shared.close()
    return {"num_bytes": puller.num_bytes, "xxh3_gb_s": puller.xxh3_gb_s(), "gb_s": rates}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the source and pull from it."""
    memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made there
    with (
        tempfile.TemporaryDirectory() as certs,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as shm_dir,
    ):
        make_dev_certs(Path(certs))
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.serving.handover", "--port", str(port)]
        command += ["--certs", certs, "--shm", shm_dir, "--tokens", str(arguments.tokens)]
        source = subprocess.Popen(command, cwd=ROOT)
        try:
            return asyncio.run(
                measure(Path(certs), Path(shm_dir), port, arguments.tokens, arguments.rounds)
            )
        finally:
            source.terminate()
            source.wait(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULT)
    for name, kind in (("--port", int), ("--certs", Path), ("--shm", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.port is not None:
        asyncio.run(serve(arguments.certs, arguments.shm, arguments.port, arguments.tokens))
        return
    measured = run(arguments)
    rates = {name: figures["median"] for name, figures in measured["gb_s"].items()}
    shm_ceiling = 1 / (1 / rates["memcpy"] + 1 / measured["xxh3_gb_s"])
    report = {
        "command": f"python -m benchmarks.serving.handover --rounds {arguments.rounds} "
        f"--tokens {arguments.tokens}",
        "commit": commit(),
        "device": device(),
        "grpc": grpc.__version__,
        "python": platform.python_version(),
        **measured,
        "grpc_to_bare": rates["grpc"] / rates["bare"],
        "shm_ceiling_gb_s": shm_ceiling,
        "shm_to_ceiling": rates["shm"] / shm_ceiling,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(", ".join(f"{name} {rate:.3f}" for name, rate in rates.items()), "GB/s")
    print(
        f"grpc {report['grpc_to_bare']:.2f} of a bare stream; "
        f"shm {report['shm_to_ceiling']:.2f} of its ceiling of {shm_ceiling:.2f} GB/s"
    )


if __name__ == "__main__":
    main()
