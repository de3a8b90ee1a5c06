"""The whole of Tidemill as real processes, which tests may kill, starve and restart.

Configuration, users, certificates and commands are those of `python -m services`
(services/stack); what differs is that every process is started and ended on its own, listens for
metrics, and serves tiny models.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import grpc
from prometheus_client.parser import text_string_to_metric_families

from services.stack import toml
from services.stack.plan import ROOT, Plan
from services.stack.ports import free_port
from services.stack.processes import Child
from services.stack.redis import cache_redis, ledger_redis
from services.stack.state import StateDirectory
from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tidemill.client import AsyncClient, RetryPolicy
from tidemill.rpc.channel import internal_channel, sdk_aio_channel
from tidemill.rpc.probe import probe
from tidemill.rpc.tls import TlsFiles

BOOK_PATH = ROOT / "prices" / "deepseek-2025-02.toml"
ONE_WORKER_MODEL = "one-worker"
OPENING_NANO = 1000 * 10**9  # 1000 USD
ROUTER_HOSTS = ("127.0.0.1", "127.0.0.2")
START_S = 90.0
STOP_S = 30.0

# Deadlines made for production would fail a test whenever the machine is busy.
PATIENT_CACHE = {"lookup_s": 10.0, "stall_s": 10.0, "pause_s": 0.2, "most_pause_s": 0.5}
TOLD_ONCE = RetryPolicy(max_retries=0)


class Process:
    """One process of the stack, started again as often as need be; its log is appended to.

    `environ` is what a start adds to our own environment.
    """

    def __init__(self, child: Child, log: Path) -> None:
        self.name = child.name
        self.log_path = log
        self.environ: dict[str, str] = {}
        self._child = child
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Process id of the last start."""
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    def start(self) -> None:
        """Returns at once; see `ready`."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._child.command,
                cwd=ROOT,
                env=os.environ | {"PYTHONFAULTHANDLER": "1"} | self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def ready(self) -> None:
        """Wait until it serves; AssertionError with the end of its log if it ends instead."""
        deadline = time.monotonic() + START_S
        while not await self._child.ready():
            assert self.running, f"{self.name} ended with {self.wait()}:\n{self.log_tail()}"
            if time.monotonic() >= deadline:
                self.send(signal.SIGABRT)  # its log then tells where it stood
                self.wait()
                raise AssertionError(f"{self.name} is not ready:\n{self.log_tail(100)}")
            await asyncio.sleep(0.1)

    def kill(self) -> float:
        """SIGKILL, and the monotonic instant of it; it is dead on return."""
        killed_at = self.send(signal.SIGKILL)
        self.wait()
        return killed_at

    def send(self, number: int) -> float:
        """Send a signal to the process, which must be running."""
        assert self.running, f"{self.name} is not running"
        assert self._process is not None
        self._process.send_signal(number)
        return time.monotonic()

    def wait(self, within_s: float = STOP_S) -> int:
        """The exit status; TimeoutExpired if it goes on for longer."""
        assert self._process is not None
        return self._process.wait(within_s)

    async def ended(self, within_s: float = STOP_S) -> int:
        """As `wait`, without blocking the event loop."""
        return await asyncio.to_thread(self.wait, within_s)

    def log_tail(self, num_lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def log_records(self) -> list[dict[str, Any]]:
        """Its JSON log lines so far, but for one that is being written."""
        lines = self.log_path.read_text(errors="replace").rpartition("\n")[0].splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


class Stack:
    """Two Redis, cache, prefill, decode, router, and a worker of both roles for a model of its own.

    `settings` are merged into the configuration file's sections; section [both] is the one-worker
    model's [decode]. Each of `twins` (prefill, decode, router) is there twice, the second one as
    "router-1" and so on. The routers' certificate is good for `router_name` too; where it is given
    their port is the same one, at ROUTER_HOSTS. `router_processes` share the first router's port.
    """

    def __init__(
        self,
        directory: Path,
        model_dir: Path,
        *,
        one_worker: bool = False,
        twins: Sequence[str] = (),
        router_name: str | None = None,
        router_processes: int = 1,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        hosts = () if router_name is None else (router_name, *ROUTER_HOSTS)
        state = StateDirectory(directory, hosts=hosts)
        state.prepare(empty=True)
        self.directory = directory
        self.plan = Plan(
            state,
            model_dir,
            router_port=free_port(),
            cache_port=free_port(),
            prefill_port=free_port(),
            decode_port=free_port(),
            cache_redis=cache_redis(free_port()),
            ledger_redis=ledger_redis(free_port()),
            routers=router_processes,
        )
        self.model_dir = model_dir
        self.ca = self.plan.ca
        self.address = self.plan.address
        self.admin_key = state.secret("admin.key")
        self._ports = {
            "cache": self.plan.cache_port,
            "prefill": self.plan.prefill_port,
            "decode": self.plan.decode_port,
            "router": self.plan.router_port,
        }
        if one_worker:
            self._ports["both"] = free_port()
        self._ports |= {f"{name}-1": free_port() for name in twins}
        self._hosts: dict[str, str] = {}
        if router_name is not None:
            self._hosts = dict(zip(("router", "router-1"), ROUTER_HOSTS, strict=True))
            self._ports["router-1"] = self.plan.router_port
        self.metrics_ports = {name: free_port() for name in self._ports}
        self.plan.write_config()
        self.config = self._configure(settings or {})
        children = [*self.plan.stores(), *self.plan.services()]
        children += [self._twin(name) for name in twins]
        if one_worker:
            children.insert(-1, self._one_worker())
        self.processes = {
            child.name: Process(child, state.logs / f"{child.name}.log") for child in children
        }

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    @property
    def workers(self) -> list[str]:
        """Names of those that hold KV."""
        return [name for name in self._ports if _kind(name) not in {"cache", "router"}]

    @property
    def routers(self) -> list[str]:
        """Names of those that clients may call."""
        return [name for name in self._ports if _kind(name) == "router"]

    def _configure(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What `python -m services` would run with, changed where tests need it to be."""
        document = tomllib.loads(self.plan.state.config.read_text())
        document["router"]["models"][0]["default_max_tokens"] = 64
        for name in ("prefill", "decode"):
            worker = document[name]
            worker["engine"] |= {"num_threads": 1, "dtype": "float32"}
            worker["cache"]["client"] = worker["peers"] = PATIENT_CACHE
            worker["fetch"] = {"margin": 1e6}  # computing the tiny model is quicker
            worker["registry"] |= {"heartbeat_s": 0.2}
            worker["in_place_tokens"] = 0  # what it measured would depend on the machine
        document["router"]["fleet"]["discover_interval_s"] = 0.2
        document["router"]["ledger"]["timeout_s"] = 10.0
        if "both" in self._ports:
            document["both"] = self._one_worker_config(document["decode"])
            (model,) = document["router"]["models"]
            document["router"]["models"].append({**model, "name": ONE_WORKER_MODEL})
        for name, port in self.metrics_ports.items():
            if name in document:
                document[name]["server"]["metrics_address"] = f"127.0.0.1:{port}"
        document = toml.merged(document, settings)
        one_worker = document.pop("both", None)
        if one_worker is not None:
            both_path = self.plan.state.path / "both.toml"
            both_path.write_text(toml.dumps({"decode": one_worker}))
        self.plan.state.config.write_text(toml.dumps(document))
        return document

    def _one_worker_config(self, decode: Mapping[str, Any]) -> dict[str, Any]:
        server = {
            **decode["server"],
            "address": f"127.0.0.1:{self._ports['both']}",
            "tls": _named(self.tls("worker")),
        }
        own = {"worker_id": "both-0", "model": ONE_WORKER_MODEL, "server": server}
        return {**decode, **own}

    def _one_worker(self) -> Child:
        path = str(self.plan.state.path / "both.toml")
        command = (sys.executable, "-m", "services.decode", "--role", "both", "--config", path)

        async def ready() -> bool:
            return await self.health("both") == "SERVING"

        return Child("both", command, ready)

    def _twin(self, name: str) -> Child:
        """The second of its kind: the first one's configuration, another place and name."""
        twin = f"{name}-1"
        server = {
            "address": self.address_of(twin),
            "metrics_address": f"127.0.0.1:{self.metrics_ports[twin]}",
        }
        own = {"money": {"router_id": twin}} if name == "router" else {"worker_id": twin}
        section = toml.merged(self.config[name], {"server": server, **own})
        path = self.plan.state.path / f"{twin}.toml"
        path.write_text(toml.dumps({name: section}))
        command = (sys.executable, "-m", f"services.{name}", "--config", str(path))

        async def ready() -> bool:
            return await self.health(twin) == "SERVING"

        return Child(twin, command, ready)

    def address_of(self, name: str) -> str:
        """host:port at which a process serves."""
        return f"{self._hosts.get(name, '127.0.0.1')}:{self._ports[name]}"

    def tls(self, name: str) -> TlsFiles:
        """The identity of a role."""
        certs = self.plan.state.certs
        return TlsFiles(cert=certs / f"{name}.pem", key=certs / f"{name}.key", ca=self.ca)

    async def start(self) -> None:
        """Start what does not run, and wait until all of it serves; nothing if all runs."""
        if all(process.running for process in self.processes.values()):
            return
        for stores in (True, False):
            group = [each for each in self.processes.values() if _is_store(each) == stores]
            for process in group:
                if not process.running:
                    process.start()
            await asyncio.gather(*(process.ready() for process in group))

    def stop(self) -> dict[str, int]:
        """SIGTERM to all services, then to both Redis; exit statuses of what ran, by name."""
        statuses = {}
        for stores in (False, True):
            group = [each for each in self.processes.values() if _is_store(each) == stores]
            ending = [process for process in group if process.running]
            for process in ending:
                process.send(signal.SIGTERM)
            for process in ending:
                try:
                    statuses[process.name] = process.wait()
                except subprocess.TimeoutExpired:
                    process.kill()
                    statuses[process.name] = process.wait()
        return statuses

    def client(
        self, key: str, *, retry: RetryPolicy = TOLD_ONCE, router: str = "router"
    ) -> AsyncClient:
        """The SDK with a tenant's key; without retries, so that a refusal is seen."""
        return AsyncClient(self.address_of(router), key, self.ca, retry=retry)

    async def key_of(self, tenant_id: str, *, paid_nano: int = OPENING_NANO) -> str:
        """A new key of a tenant, which is made if need be and has paid in `paid_nano`, once."""
        async with AsyncClient(self.address, self.admin_key, self.ca) as operator:
            await operator.admin.create_tenant(tenant_id)
            await operator.admin.top_up(tenant_id, paid_nano, operation_id="opening")
            return (await operator.admin.create_key(tenant_id)).key

    @asynccontextmanager
    async def raw(self) -> AsyncIterator[grpc.aio.Channel]:
        """A plain channel to the router, for what the SDK would not send."""
        async with sdk_aio_channel(self.address, ca=self.ca, options=()) as channel:
            yield channel

    def _channel(self, name: str) -> grpc.aio.Channel:
        address = self.address_of(name)
        if _kind(name) == "router":
            return sdk_aio_channel(address, ca=self.ca)
        role = "decode" if name == "both" else _kind(name)
        return internal_channel(address, role=role, tls=self.tls("router"))

    async def health(self, name: str) -> str:
        """What grpc.health.v1 says, or why it cannot be asked."""
        async with self._channel(name) as channel:
            return await probe(channel)

    async def load(self, name: str) -> pb.WatchLoadResponse:
        """A worker's load now."""
        async with self._channel(name) as channel:
            stub = cast(Any, WorkerServiceStub(channel))
            call = stub.WatchLoad(pb.WatchLoadRequest(), timeout=10)
            message = await call.read()
            call.cancel()
        assert isinstance(message, pb.WatchLoadResponse)
        return message

    async def metrics(self, name: str) -> "Metrics":
        """All samples of a process."""
        url = f"http://127.0.0.1:{self.metrics_ports[name]}/metrics"
        return Metrics(await asyncio.to_thread(_read, url))

    async def until_idle(self, *, within_s: float = 60.0) -> None:
        """R1: wait until no worker holds a block and the router nothing, as they tell it."""
        for name in self.workers:
            if self[name].running:
                await eventually(partial(self._worker_is_idle, name), within_s)
        for name in self.routers:
            if self[name].running:
                await eventually(partial(self._router_is_idle, name), within_s)

    async def _worker_is_idle(self, name: str) -> bool:
        load, metrics = await self.load(name), await self.metrics(name)
        held = [tier.total_blocks - tier.free_blocks for tier in load.tiers]
        left = [load.queued_uncached_tokens, load.prefilling, load.running, load.waiting]
        kept = metrics.total("tidemill_worker_finals_kept")
        return not any([*held, *left, load.open_handovers, kept])

    async def _router_is_idle(self, name: str) -> bool:
        metrics = await self.metrics(name)
        return not any(
            metrics.total(f"tidemill_router_{what}_requests") for what in ("queued", "running")
        )

    def settled(self) -> dict[str, dict[str, Any]]:
        """Receipts in the router's log, by request id; each request must have one only."""
        found: dict[str, dict[str, Any]] = {}
        for record in self["router"].log_records():
            if record.get("message") == "settled":
                receipt = record["receipt"]
                assert receipt["request_id"] not in found
                found[receipt["request_id"]] = receipt
        return found


class Metrics:
    """Prometheus samples of one process at one moment."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self._samples = [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """Sum of the samples of that name that carry `labels`; 0 if there is none."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


async def eventually(holds: Callable[[], Awaitable[bool]], within_s: float = 60.0) -> None:
    """Wait until `holds()`; TimeoutError if it never does."""
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110 - another process has no event to wait for
            await asyncio.sleep(0.05)


def words(num_words: int, *, start: int = 0) -> str:
    """A text of numbered words, near five tokens each; those of one start share a prefix."""
    return " ".join(f"w{start + index:04d}" for index in range(num_words))


def sum_of(receipts: Iterable[Mapping[str, Any]], *names: str) -> int:
    """Total of some fields over receipts."""
    return sum(int(receipt[name]) for receipt in receipts for name in names)


def _named(files: TlsFiles) -> dict[str, str]:
    return {"cert": str(files.cert), "key": str(files.key), "ca": str(files.ca)}


def _is_store(process: Process) -> bool:
    return process.name.startswith("redis")


def _kind(name: str) -> str:
    return name.removesuffix("-1")


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:  # noqa: S310 - our own loopback port
        return str(answer.read().decode())
