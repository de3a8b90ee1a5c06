"""OpenTelemetry spans of calls, where a collector is configured (extra `otel`).

Each server gives every call but health a span that continues the caller's W3C `traceparent`; calls
that are made for it carry it on (`outgoing`), so a request is one trace through router, decode and
prefill. What the router knows in the end goes on its span by the names of OpenTelemetry's GenAI
conventions (`describe`). Never a prompt, an answer or a key.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import grpc

from tidemill.errors import ConfigError
from tidemill.rpc.address import is_loopback
from tidemill.rpc.interceptors import Call
from tidemill.rpc.tls import TlsFiles

try:
    from opentelemetry import propagate, trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
except ModuleNotFoundError:  # without the extra nothing is traced
    _INSTALLED = False
else:
    _INSTALLED = True

Metadata = tuple[tuple[str, str], ...]


class Tracing:
    """Guard: a span for each call, sent in batches to the collector at `endpoint` (OTLP, gRPC).

    Raises ConfigError without the extra, and beyond loopback without `tls`, which is then this
    process's identity to the collector.
    """

    def __init__(self, service: str, endpoint: str, tls: TlsFiles | None) -> None:
        if not _INSTALLED:
            raise ConfigError("otlp_endpoint is set: install tidemill[otel]")
        if is_loopback(endpoint):
            exporter = OTLPSpanExporter(endpoint, insecure=True)
        elif tls is None:
            raise ConfigError(f"otlp_endpoint {endpoint} is not on loopback and needs tls")
        else:
            exporter = OTLPSpanExporter(endpoint, credentials=_credentials(tls))
        self._provider = TracerProvider(resource=Resource({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tidemill")

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """The call's span, current while it is handled."""
        if call.is_health:
            yield
            return
        sent = dict(call.context.invocation_metadata() or ())
        with self._tracer.start_as_current_span(
            call.method.removeprefix("/"),
            context=propagate.extract(sent),
            kind=trace.SpanKind.SERVER,
            attributes=_attributes(call),
            record_exception=False,
        ):
            yield

    def close(self) -> None:
        """Send what is left; blocks until it is sent, or the collector is given up."""
        self._provider.shutdown()


def outgoing() -> Metadata:
    """What a call must carry to belong to the trace that runs here; () if none does."""
    if not _INSTALLED or not trace.get_current_span().get_span_context().is_valid:
        return ()
    carried: dict[str, str] = {}
    propagate.inject(carried)
    return tuple(carried.items())


def describe(attributes: Mapping[str, str | int | float]) -> None:
    """Put these on the span that runs here, if one does."""
    if _INSTALLED and (span := trace.get_current_span()).is_recording():
        span.set_attributes(attributes)


def _attributes(call: Call) -> dict[str, str]:
    service, _, method = call.method.removeprefix("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    if call.request_id is not None:
        attributes["tidemill.request_id"] = call.request_id
    return attributes


def _credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=tls.ca.read_bytes(),
        private_key=tls.key.read_bytes(),
        certificate_chain=tls.cert.read_bytes(),
    )
