"""A gRPC server with what all of ours have: limits, TLS, guards, health, drain."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tidemill.errors import ConfigError
from tidemill.rpc.address import split_address
from tidemill.rpc.health import Health, Readiness
from tidemill.rpc.interceptors import (
    AccessLog,
    CallInterceptor,
    Guard,
    map_errors,
)
from tidemill.rpc.metrics import RpcMetrics
from tidemill.rpc.options import INTERNAL_SERVER, PUBLIC_SERVER, Options
from tidemill.rpc.places import Places
from tidemill.rpc.tls import TlsFiles, check_bind, server_credentials
from tidemill.rpc.tracing import Tracing

_READINESS_PERIOD_S = 1.0
_HEALTH_CALLS = 64  # at once; watchers are load balancers and a person or two

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    """Where and how a process listens.

    `address` is host:port, port 0 takes a free one. `own_address` is another one at which the
    same is served: where several processes share `address`, each can be asked for its health there.
    `max_concurrent_rpcs` calls are handled at once, further ones told to come again; at the
    router's public port one tenant can have half of them.
    `drain_s` is how long calls may go on once the process has been told to stop. `metrics_address`
    unset: no metrics port. `reflection` tells any caller that the port admits what its methods are.
    `otlp_endpoint`, host:port of an OpenTelemetry collector (OTLP over gRPC), unset: no spans.
    """

    address: str = "127.0.0.1:0"
    own_address: str | None = None
    tls: TlsFiles | None = None
    max_concurrent_rpcs: int = 2048
    drain_s: float = 10.0
    metrics_address: str | None = None
    reflection: bool = False
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if self.max_concurrent_rpcs < 1:
            raise ValueError("max_concurrent_rpcs must be at least 1")
        if self.drain_s < 0:
            raise ValueError("drain_s must not be negative")


class RpcServer:
    """Add servicers to `.server`, name them for health with add_service_name(), then start().

    `public` is the router's front door: server-side TLS, callers bring an API key. All other
    ports demand a client certificate, so they cannot do without TLS even on loopback.
    `readiness` says why this process is not ready, None when it is; it is asked every second and
    drives grpc.health.v1. `guards` run inside the access log and the error mapping. Spans are
    those of `service`.
    Constructing raises ConfigError where the configuration forbids to listen.
    """

    def __init__(
        self,
        config: ServerConfig,
        *,
        public: bool,
        readiness: Readiness,
        guards: Sequence[Guard] = (),
        metrics: RpcMetrics | None = None,
        service: str = "tidemill",
        options: Options | None = None,
    ) -> None:
        self._addresses = [config.address, *filter(None, [config.own_address])]
        for address in self._addresses:
            check_bind(address, tls=config.tls is not None)
        if not public and config.tls is None:
            raise ConfigError(f"internal port {config.address} needs tls: cert, key and ca")
        self._config = config
        self._credentials = (
            server_credentials(config.tls, client_certs=not public) if config.tls else None
        )
        defaults = PUBLIC_SERVER if public else INTERNAL_SERVER
        endpoint = config.otlp_endpoint
        self._tracing = None if endpoint is None else Tracing(service, endpoint, config.tls)
        places = Places(config.max_concurrent_rpcs, most_health=_HEALTH_CALLS)
        around: tuple[Guard, ...] = (AccessLog(metrics), map_errors, places)
        if self._tracing is not None:
            around = (self._tracing, *around)
        self.server = grpc.aio.server(
            interceptors=(CallInterceptor(*around, *guards),),
            options=defaults if options is None else options,
        )
        self._health = Health(readiness)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._names: list[str] = []
        self._watch: asyncio.Task[None] | None = None
        self._port = 0

    def add_service_name(self, name: str) -> None:
        """Make `name` (`package.Service`) known to health and reflection. Before start()."""
        self._names.append(name)

    @property
    def port(self) -> int:
        """The port listened on, once started."""
        return self._port

    @property
    def address(self) -> str:
        """host:port listened on, once started."""
        host = self._config.address.rpartition(":")[0]
        return f"{host}:{self._port}"

    async def start(self) -> None:
        """Listen. Raises ConfigError naming the address when it cannot be had."""
        self._port, *_ = [self._bind(address) for address in self._addresses]
        if self._config.reflection:
            names = [*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self.server)
        self._health.start(self._names)
        await self.server.start()
        self._watch = asyncio.create_task(self._health.follow(_READINESS_PERIOD_S))

    def _bind(self, address: str) -> int:
        try:
            if self._credentials is not None:
                return self.server.add_secure_port(address, self._credentials)
            return self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {address}: {_why_not(address)}") from error

    def set_readiness_now(self) -> None:
        """Ask `readiness` at once instead of within the second."""
        self._health.refresh()

    async def drain(self, *, and_s: float = 0.0) -> None:
        """Stop well: health says NOT_SERVING, no new calls, running ones get `drain_s` `and_s`."""
        if self._watch is not None:
            self._watch.cancel()
        await self._health.end()
        await self.server.stop(self._config.drain_s + and_s)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self.server.wait_for_termination()


def _why_not(address: str) -> str:
    """What the operating system says to a plain attempt; gRPC does not pass it on."""
    try:
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, port))
    except OSError as error:
        return error.strerror or str(error)
    return "gRPC refused the address"
