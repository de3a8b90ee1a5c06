import ssl
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry, Counter

from tidemill.errors import ConfigError
from tidemill.rpc.metrics import serve_metrics
from tidemill.rpc.tls import TlsFiles


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("tidemill_test", "For tests.", registry=registry).inc(3)
    return registry


def get(url: str, context: ssl.SSLContext | None = None) -> str:
    with urllib.request.urlopen(url, timeout=30, context=context) as response:  # noqa: S310
        text: str = response.read().decode()
        return text


def test_metrics_are_shown_on_loopback_until_closed(registry: CollectorRegistry) -> None:
    endpoint = serve_metrics("127.0.0.1:0", registry=registry)
    url = f"http://127.0.0.1:{endpoint.port}/metrics"
    assert "tidemill_test_total 3.0" in get(url)
    endpoint.close()
    with pytest.raises(urllib.error.URLError):
        get(url)


def test_metrics_beyond_loopback_need_tls() -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        serve_metrics("0.0.0.0:0")


def test_a_taken_port_is_named(registry: CollectorRegistry) -> None:
    endpoint = serve_metrics("127.0.0.1:0", registry=registry)
    try:
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{endpoint.port}.*in use"):
            serve_metrics(f"127.0.0.1:{endpoint.port}", registry=registry)
    finally:
        endpoint.close()


def test_with_tls_only_our_own_certificates_may_look(
    registry: CollectorRegistry, tls_files: Callable[[str], TlsFiles]
) -> None:
    tls = tls_files("router")
    endpoint = serve_metrics("127.0.0.1:0", tls=tls_files("cache"), registry=registry)
    try:
        url = f"https://127.0.0.1:{endpoint.port}/metrics"
        context = ssl.create_default_context(cafile=str(tls.ca))
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            get(url, context)
        context.load_cert_chain(tls.cert, tls.key)
        assert "tidemill_test_total 3.0" in get(url, context)
    finally:
        endpoint.close()
