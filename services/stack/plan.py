"""What a local stack consists of: ports, the one configuration file, and the processes."""

import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from services.stack import toml
from services.stack.ports import free_port, free_ports
from services.stack.processes import Child
from services.stack.redis import (
    RedisInstance,
    answers,
    cache_redis,
    ledger_redis,
    server_binary,
    write_redis_config,
)
from services.stack.state import SIGNING_KEY, StateDirectory, write_private
from tidemill.rpc.channel import internal_channel, sdk_aio_channel
from tidemill.rpc.probe import probe
from tidemill.rpc.tls import TlsFiles

T = TypeVar("T")

SERVICES = ("cache", "prefill", "decode", "router")

ROOT = Path(__file__).resolve().parents[2]
PRICE_BOOK = ROOT / "prices" / "deepseek-2025-02.toml"
MODEL = "tidemill-demo"
CACHE_BYTES = 512 << 20
CACHE_DISK_BYTES = 2 << 30
NUM_BLOCKS = 512  # of KV for each worker: 32,768 tokens
MAX_BATCH = 16
DEFAULT_MAX_TOKENS = 256


def new_metrics_ports(routers: int = 1) -> dict[str, int]:
    """Free ones by service; the routers' lie next to each other."""
    return {name: free_ports(routers if name == "router" else 1) for name in SERVICES}


@dataclass(frozen=True)
class Plan:
    """One local stack. `both` is one worker that prefills and decodes, else one of each.

    `shm_dir` is where the workers share memory; None: they move latents by gRPC. `settings` are
    laid over the sections of the configuration. `routers` processes share the router's port; their
    metrics ports are that of the first and those that follow it.
    """

    state: StateDirectory
    model_dir: Path
    both: bool = False
    shm_dir: Path | None = None
    router_port: int = field(default_factory=free_port)
    cache_port: int = field(default_factory=free_port)
    prefill_port: int = field(default_factory=free_port)
    decode_port: int = field(default_factory=free_port)
    cache_redis: RedisInstance = field(default_factory=lambda: cache_redis(free_port()))
    ledger_redis: RedisInstance = field(default_factory=lambda: ledger_redis(free_port()))
    metrics_ports: Mapping[str, int] = field(default_factory=new_metrics_ports)
    routers: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The router's, for clients."""
        return f"127.0.0.1:{self.router_port}"

    @property
    def metrics_pages(self) -> dict[str, str]:
        """Prometheus pages by service."""
        names = [name for name in SERVICES if not (self.both and name == "prefill")]
        ports = {name: self.metrics_ports[name] for name in names}
        ports |= {f"router-{n}": ports["router"] + n for n in range(1, self.routers)}
        return {name: f"http://127.0.0.1:{port}/metrics" for name, port in ports.items()}

    @property
    def worker_pages(self) -> list[str]:
        """Of those, the workers'."""
        pages = self.metrics_pages
        return [pages[name] for name in ("prefill", "decode") if name in pages]

    @property
    def ca(self) -> Path:
        """What clients trust."""
        return self.state.certs / "ca.pem"

    def write_config(self) -> None:
        """Write the file that all services read, with passwords: for its owner alone."""
        document: dict[str, Any] = {"cache": self._cache(), "router": self._router()}
        if not self.both:
            document["prefill"] = self._worker("prefill", self.prefill_port, "prefill")
        document["decode"] = self._worker(
            "decode", self.decode_port, "worker" if self.both else "decode"
        )
        write_private(self.state.config, toml.dumps(toml.merged(document, self.settings)))

    def stores(self) -> list[Child]:
        """Both Redis: what the services need before they start."""
        users = {"redis-cache": "cache", "redis-ledger": "ledger"}
        children = []
        for instance in (self.cache_redis, self.ledger_redis):
            url = instance.url(self.state, users[instance.name])
            command = (server_binary(), str(write_redis_config(instance, self.state)))
            children.append(Child(instance.name, command, _ready(answers, url)))
        return children

    def services(self) -> list[Child]:
        """The services, those first that others call."""
        children = [self._service("cache", self.cache_port, "cache")]
        if not self.both:
            children.append(self._service("prefill", self.prefill_port, "prefill"))
        role = ("--role", "both") if self.both else ()
        children.append(self._service("decode", self.decode_port, "decode", *role))
        count = ("--processes", str(self.routers)) if self.routers > 1 else ()
        children.append(self._service("router", self.router_port, None, *count))
        return children

    def _service(self, name: str, port: int, role: str | None, *arguments: str) -> Child:
        command = (sys.executable, "-m", f"services.{name}", "--config", str(self.state.config))

        def channel() -> grpc.aio.Channel:
            address = f"127.0.0.1:{port}"
            if role is None:
                return sdk_aio_channel(address, ca=self.ca)
            return internal_channel(address, role=role, tls=self._tls_files("router"))

        return Child(name, (*command, *arguments), _ready(_serves, channel))

    def _tls_files(self, name: str) -> TlsFiles:
        certs = self.state.certs
        return TlsFiles(cert=certs / f"{name}.pem", key=certs / f"{name}.key", ca=self.ca)

    def _tls(self, name: str) -> dict[str, Path]:
        files = self._tls_files(name)
        return {"cert": files.cert, "key": files.key, "ca": files.ca}

    def _server(self, name: str, port: int, certificate: str) -> dict[str, Any]:
        return {
            "address": f"127.0.0.1:{port}",
            "metrics_address": f"127.0.0.1:{self.metrics_ports[name]}",
            "drain_s": 5.0,
            "tls": self._tls(certificate),
        }

    def _cache(self) -> dict[str, Any]:
        return {
            "node_id": "cache-0",
            "capacity_bytes": CACHE_BYTES,
            "disk_path": self.state.cache_disk,
            "disk_capacity_bytes": CACHE_DISK_BYTES,
            "redis_url": self.cache_redis.url(self.state, "cache"),
            "server": self._server("cache", self.cache_port, "cache"),
        }

    def _worker(self, name: str, port: int, certificate: str) -> dict[str, Any]:
        num_workers = 1 if self.both else 2
        return {
            "worker_id": f"{name}-0",
            "model": MODEL,
            "model_dir": self.model_dir,
            "server": self._server(name, port, certificate),
            "engine": {
                "num_blocks": NUM_BLOCKS,
                "max_batch": MAX_BATCH,
                "num_threads": max((os.cpu_count() or 1) // num_workers, 1),
            },
            "handover": {"shm_dir": self.shm_dir},
            "cache": {"address": f"127.0.0.1:{self.cache_port}"},
            "registry": {"url": self.cache_redis.url(self.state, "worker")},
        }

    def _router(self) -> dict[str, Any]:
        return {
            "price_book": PRICE_BOOK,
            "server": self._server("router", self.router_port, "router"),
            "ledger": {
                "url": self.ledger_redis.url(self.state, "ledger"),
                "pepper_file": self.state.secrets / "pepper",
                "admin_key_file": self.state.secrets / "admin.key",
            },
            "money": {
                "signing_key_file": self.state.secrets / SIGNING_KEY,
                "spool_dir": self.state.spool,
            },
            "fleet": {
                "cache_url": self.cache_redis.url(self.state, "router"),
                "tls": self._tls("router"),
            },
            "models": [
                {
                    "name": MODEL,
                    "path": self.model_dir,
                    "price_model": "deepseek-chat",
                    "default_max_tokens": DEFAULT_MAX_TOKENS,
                }
            ],
        }


def _ready(ask: Callable[[T], Awaitable[bool]], of: T) -> Callable[[], Awaitable[bool]]:
    return lambda: ask(of)


async def _serves(channel: Callable[[], grpc.aio.Channel]) -> bool:
    async with channel() as opened:
        return await probe(opened) == "SERVING"
