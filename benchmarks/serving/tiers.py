"""A prompt's time to its first token by the tier in which it lies, and what a slow store costs.

    python -m benchmarks.serving.tiers [--rounds 7] [--tokens 2049] [--model models/demo]

Workers that prefill in place, in this process; the cache service, once with memory and once with
little memory and a disk, and one more worker as the peer, in processes of their own; loopback,
mutual TLS. Every round has a fresh random prompt and asks for it in each way in turn (ABAB);
figures are medians of all rounds but the first two, in which the averages of fetch-or-recompute
learn. TTFT is from sending Start to reading PrefillDone.

    none        computed: nothing is held, and no cache is configured
    device      in the worker's pool
    host        evicted from there into host memory
    cache_ram   in the cache service's memory
    cache_disk  on its disk (read back through the page cache)
    peer        in another worker's pool
    slow_10x    as cache_ram over a wire with a tenth of the rate that cache_ram reached
    too_slow    over one on which fetching would take ten times as long as computing

What to expect: a reused prompt still computes its last token, one step, so `device` is the floor of
the rest; the others add copying or fetching `megabytes`. The last two rows may not exceed `none` by
more than a tenth: the policy (policy/fetch_or_recompute.py) fetches only what is quicker.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry

from benchmarks.provenance import ROOT, commit, device
from benchmarks.serving.cache_rpc import (
    tls_files,
    until_up,
)
from services.stack.ports import free_port
from tests.slow_link import SlowLink
from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, KvPeer, ResolvedSampling, WorkerTask
from tidemill.api.common.v1.usage_pb2 import PromptUsage
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from tidemill.certs import make_dev_certs
from tidemill.engine import EngineConfig
from tidemill.kv.cache_client import CacheClientConfig
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.server import ServerConfig
from tidemill.worker.config import CacheConfig, Role, WorkerConfig
from tidemill.worker.metrics import WorkerMetrics
from tidemill.worker.process import RunningWorker, running_worker

RESULT = Path(__file__).with_name("results") / "tiers.json"
WARM_UP = 2
WAYS = ["none", "device", "host", "cache_ram", "cache_disk", "peer", "slow_10x", "too_slow"]
PATIENT = CacheClientConfig(lookup_s=10, stall_s=10)


class Asker:
    """One worker and the router's side of it."""

    def __init__(self, worker: RunningWorker, channel: grpc.aio.Channel) -> None:
        self.worker = worker
        self._stub: Any = DecodeServiceStub(channel)
        self._num_asked = 0

    async def ask(self, token_ids: list[int], *peers: KvPeer) -> tuple[float, PromptUsage]:
        """Seconds to the first token, and what became of the prompt."""
        self._num_asked += 1
        sampling = ResolvedSampling(top_p=1.0, max_tokens=1)
        task = WorkerTask(
            id=AttemptId(request_id=f"q{self._num_asked}", attempt=1, fence=1),
            tenant_id="bench",
            cache_scope=b"s" * 32,
            token_ids=token_ids,
            sampling=sampling,
            peers=peers,
        )
        call = self._stub.Decode()
        begun = time.perf_counter()
        await call.write(pb.DecodeRequest(start=pb.Start(task=task)))
        response = await call.read()
        seconds = time.perf_counter() - begun
        usage: PromptUsage = response.prefill_done.usage
        await call.done_writing()
        while isinstance(await call.read(), pb.DecodeResponse):
            pass
        return seconds, usage

    def evict(self) -> None:
        """Push all that the device pool holds out of it."""
        pool = self.worker.worker.engine.pool
        pool.release(pool.allocate(pool.num_free))

    async def stored(self, num_blocks: int) -> None:
        """Wait until the cache has taken so many blocks in all."""
        registry = self.worker.worker.metrics.registry
        name = "tidemill_worker_cache_stored_blocks_total"
        while (registry.get_sample_value(name) or 0) < num_blocks:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


def worker_config(certs: Path, model: Path, name: str, **settings: Any) -> WorkerConfig:
    host_blocks = settings.pop("host_cache_blocks", 0)
    return WorkerConfig(
        worker_id=name,
        model="bench",
        model_dir=model,
        engine=EngineConfig(num_blocks=96, host_cache_blocks=host_blocks),
        server=ServerConfig(tls=tls_files(certs, "worker"), drain_s=0.2),
        **settings,
    )


@asynccontextmanager
async def asker(certs: Path, model: Path, name: str, **settings: Any) -> AsyncIterator[Asker]:
    config = worker_config(certs, model, name, **settings)
    metrics = WorkerMetrics(CollectorRegistry())
    async with running_worker(config, Role.BOTH, metrics=metrics) as worker:
        channel = internal_channel(worker.address, role="decode", tls=tls_files(certs, "router"))
        yield Asker(worker, channel)
        await channel.close()


@contextmanager
def process(*command: str) -> Iterator[None]:
    started = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT)
    try:
        yield
    finally:
        started.terminate()
        started.wait(20)


@contextmanager
def cache_process(certs: Path, disk: Path | None = None) -> Iterator[int]:
    """`services.cache`, with memory for everything or, given a disk, for little; its port."""
    port = free_port()
    lines = [f"[cache]\ncapacity_bytes = {1 << 20 if disk else 1 << 30}"]
    if disk is not None:
        lines.append(f'disk_path = "{disk}"\ndisk_capacity_bytes = {1 << 30}')
    lines.append(f'[cache.server]\naddress = "127.0.0.1:{port}"\n[cache.server.tls]')
    lines.append('cert = "cache.pem"\nkey = "cache.key"\nca = "ca.pem"\n')
    config = certs / f"cache-{port}.toml"
    config.write_text("\n".join(lines), encoding="utf-8")
    with process("services.cache", "--config", str(config)):
        yield port


async def serve_peer(certs: Path, model: Path, port: int) -> None:
    """A worker that others may ask, until it is terminated."""
    config = worker_config(certs, model, "holder", advertise=f"127.0.0.1:{port}")
    server = ServerConfig(address=f"127.0.0.1:{port}", tls=tls_files(certs, "worker"))
    async with running_worker(WorkerConfig(**{**vars(config), "server": server}), Role.BOTH):
        await asyncio.Event().wait()


class Scene:
    """All askers and holders, and one round over them."""

    def __init__(self, num_tokens: int, peer: KvPeer, link: SlowLink) -> None:
        self.askers: dict[str, Asker] = {}
        self.holder: Asker | None = None
        self.rounds: dict[str, list[tuple[float, PromptUsage]]] = defaultdict(list)
        self._num_blocks = (num_tokens - 1) // 64
        self._peer = peer
        self._link = link
        self._num_rounds = 0

    async def round(self, prompt: list[int], block_bytes: int) -> None:
        """The prompt in every way, and the throttle by what the ways have shown so far."""
        self._num_rounds += 1
        askers = self.askers
        took = self.rounds
        took["none"].append(await askers["local"].ask(prompt))
        took["device"].append(await askers["local"].ask(prompt))
        askers["local"].evict()
        took["host"].append(await askers["local"].ask(prompt))
        for name in ("cache_ram", "cache_disk"):
            await askers[name].ask(prompt)
            await askers[name].stored(self._num_blocks * self._num_rounds)
            askers[name].evict()
            took[name].append(await askers[name].ask(prompt))
        assert self.holder is not None
        await self.holder.ask(prompt)
        took["peer"].append(await askers["peer"].ask(prompt, self._peer))
        num_bytes = self._num_blocks * block_bytes
        none, ram, device = (
            statistics.median(seconds for seconds, _ in took[name])
            for name in ("none", "cache_ram", "device")
        )
        fetch_s = max(ram - device, 1e-3)
        for name, seconds in (("slow_10x", 10 * fetch_s), ("too_slow", 10 * none)):
            self._link.bytes_per_s = num_bytes / seconds
            took[name].append(await askers[name].ask(prompt))


async def measure(certs: Path, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    vocab_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    rng = Random(0)
    with ExitStack() as processes, tempfile.TemporaryDirectory() as disk:
        opened = processes.enter_context
        ram_port = opened(cache_process(certs))
        disk_port = opened(cache_process(certs, Path(disk)))
        peer_port = free_port()
        opened(
            process(
                "benchmarks.serving.tiers",
                *("--certs", str(certs), "--model", str(model), "--port", str(peer_port)),
            )
        )
        link = SlowLink(free_port(), ram_port)
        processes.callback(link.close)
        await until_up(certs, (ram_port, disk_port))
        await until_up(certs, (peer_port,), role="decode")
        peer = KvPeer(worker_id="holder", address=f"127.0.0.1:{peer_port}", role="decode")
        scene = Scene(arguments.tokens, peer, link)
        caches = {
            "cache_ram": ram_port,
            "cache_disk": disk_port,
            "slow_10x": link.port,
            "too_slow": link.port,
        }
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            scene.askers["local"] = await enter(asker(certs, model, "local", host_cache_blocks=96))
            scene.askers["peer"] = await enter(asker(certs, model, "peer", peers=PATIENT))
            for name, port in caches.items():
                cache = CacheConfig(f"127.0.0.1:{port}", client=PATIENT)
                if port == link.port:
                    cache = CacheConfig(cache.address, store_queue_blocks=0, client=PATIENT)
                scene.askers[name] = await enter(asker(certs, model, name, cache=cache))
            tls = tls_files(certs, "router")
            channel = internal_channel(peer.address, role="decode", tls=tls)
            stack.push_async_callback(channel.close)
            scene.holder = Asker(scene.askers["local"].worker, channel)
            layout = scene.askers["local"].worker.worker.engine.layout
            for _ in range(arguments.rounds + WARM_UP):
                prompt = rng.choices(range(3, vocab_size), k=arguments.tokens)
                await scene.round(prompt, layout.block_bytes)
        return {
            "megabytes": (arguments.tokens - 1) // 64 * layout.block_bytes / 1e6,
            "rows": rows(scene.rounds),
        }


def rows(rounds: dict[str, list[tuple[float, PromptUsage]]]) -> list[dict[str, Any]]:
    """Medians, each beside the computed prompt's."""
    found = []
    none_s = statistics.median(seconds for seconds, _ in rounds["none"][WARM_UP:])
    for name in WAYS:
        measured = rounds[name][WARM_UP:]
        seconds = [each for each, _ in measured]
        usages = [usage for _, usage in measured]
        median_s = statistics.median(seconds)
        found.append(
            {
                "tier": name,
                "ttft_ms": round(1e3 * median_s, 2),
                "ttft_ms_range": [round(1e3 * edge(seconds), 2) for edge in (min, max)],
                "of_none": round(median_s / none_s, 3),
                "reused_tokens": statistics.median(
                    usage.prompt_tokens - usage.computed_tokens for usage in usages
                ),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2049)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--out", type=Path, default=RESULT)
    for name, kind in (("--port", int), ("--certs", Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.port is not None:
        asyncio.run(serve_peer(arguments.certs, arguments.model, arguments.port))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_dev_certs(Path(scratch))
        measured = asyncio.run(measure(Path(scratch), arguments.model.resolve(), arguments))
    report = {
        "command": f"python -m benchmarks.serving.tiers --rounds {arguments.rounds} "
        f"--tokens {arguments.tokens}",
        "commit": commit(),
        "device": device(),
        "torch": torch.__version__,
        "model": arguments.model.name,
        **measured,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in measured["rows"]:
        low, high = row["ttft_ms_range"]
        print(
            f"{row['tier']:>10} {row['ttft_ms']:>8.1f} ms ({low:.1f} to {high:.1f}), "
            f"{row['of_none']:.2f} of none, {row['reused_tokens']:.0f} tokens reused"
        )


if __name__ == "__main__":
    main()
