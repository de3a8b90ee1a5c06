from pathlib import Path

import pytest

from tidemill.client.settings import CHANNEL_OPTIONS, resolve
from tidemill.errors import ConfigError


def test_arguments_go_before_the_environment() -> None:
    environ = {
        "TIDEMILL_ADDRESS": "mill.example:7443",
        "TIDEMILL_API_KEY": "tm_env.secret",
        "TIDEMILL_CA": "env.pem",
    }
    from_environment = resolve(None, None, None, None, environ)
    assert from_environment.address == "mill.example:7443"
    assert from_environment.ca == Path("env.pem")
    assert from_environment.metadata == (("authorization", "Bearer tm_env.secret"),)
    given = resolve("127.0.0.1:1", "tm_given.secret", b"PEM", None, environ)
    assert given.address == "127.0.0.1:1"
    assert given.ca == b"PEM"
    assert given.api_key == "tm_given.secret"


@pytest.mark.parametrize(
    ("address", "ca", "insecure", "expected"),
    [
        ("127.0.0.1:1", None, None, True),
        ("localhost:1", "ca.pem", None, False),
        ("127.0.0.1:1", None, False, False),
        ("mill.example:1", None, None, False),
    ],
)
def test_plaintext_only_where_nothing_else_is_asked_on_loopback(
    address: str, ca: str | None, insecure: bool | None, expected: bool
) -> None:
    assert resolve(address, None, ca, insecure, {}).insecure is expected


def test_a_key_never_leaves_in_plaintext() -> None:
    with pytest.raises(ConfigError, match="without TLS"):
        resolve("mill.example:1", "tm_k.s", None, True, {})


def test_what_is_missing_or_malformed_is_named() -> None:
    with pytest.raises(ConfigError, match="TIDEMILL_ADDRESS"):
        resolve(None, None, None, None, {})
    with pytest.raises(ConfigError, match="not host:port"):
        resolve("mill", None, None, None, {})
    with pytest.raises(ConfigError, match="TIDEMILL_API_KEY"):
        resolve("127.0.0.1:1", "key\nx", None, None, {})


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(resolve("127.0.0.1:1", "tm_k.secret", None, None, {}))


def test_long_silences_keep_the_connection() -> None:
    options = dict(CHANNEL_OPTIONS)
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.keepalive_timeout_ms"] == 10_000
    assert options["grpc.http2.max_pings_without_data"] == 0
    assert "grpc.service_config" not in options  # one layer of retries, ours
