"""Prometheus: the metrics of every RPC server, and the HTTP port that shows them."""

import threading
from dataclasses import dataclass
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    start_http_server,
)

from tidemill.errors import ConfigError
from tidemill.rpc.address import split_address
from tidemill.rpc.tls import TlsFiles, check_bind

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 60, 300, 1800)


class RpcMetrics:
    """tidemill_rpc_*: calls by method and code, their duration, and those in flight."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._handled = Counter(
            "tidemill_rpc_handled",
            "Calls that ended, by gRPC code.",
            ["method", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "tidemill_rpc_duration_seconds",
            "From the call's arrival to its last message.",
            ["method"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge(
            "tidemill_rpc_in_flight", "Calls being handled now.", ["method"], registry=registry
        )

    def started(self, method: str) -> None:
        """A call of `method` arrived."""
        self._in_flight.labels(method).inc()

    def finished(self, method: str, code: str, seconds: float) -> None:
        """The call ended with gRPC code `code` after `seconds`."""
        self._in_flight.labels(method).dec()
        self._handled.labels(method, code).inc()
        self._seconds.labels(method).observe(seconds)


@dataclass(frozen=True)
class MetricsEndpoint:
    """A running /metrics port."""

    server: WSGIServer
    thread: threading.Thread

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server.server_port

    def close(self) -> None:
        """Stop listening; returns once the thread has ended."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def serve_metrics(
    address: str, *, tls: TlsFiles | None = None, registry: CollectorRegistry = REGISTRY
) -> MetricsEndpoint:
    """Show `registry` over HTTP at `address`, in a thread.

    On loopback plain HTTP; elsewhere only with `tls`, which then demands a client certificate.
    Raises ConfigError when that is missing or the port is taken.
    """
    check_bind(address, tls=tls is not None)
    host, port = split_address(address)
    # No second series for each that says when it began.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped there
    try:
        if tls is None:
            server, thread = start_http_server(port, host, registry)
        else:
            server, thread = start_http_server(
                port,
                host,
                registry,
                certfile=str(tls.cert),
                keyfile=str(tls.key),
                client_cafile=str(tls.ca),
                client_auth_required=True,
            )
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {address}: {error.strerror}") from error
    return MetricsEndpoint(server, thread)
