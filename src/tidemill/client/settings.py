"""Where the router is and who calls it: arguments first, then TIDEMILL_* variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tidemill.errors import ConfigError
from tidemill.rpc.address import is_loopback
from tidemill.rpc.options import SDK_CLIENT, Options

ADDRESS: Final = "TIDEMILL_ADDRESS"
API_KEY: Final = "TIDEMILL_API_KEY"
CA: Final = "TIDEMILL_CA"

# The SDK retries on its own, with the request's id and RetryInfo in view; a second layer inside
# gRPC would multiply the attempts. A lost connection is tried again sooner than gRPC would.
CHANNEL_OPTIONS: Final[Options] = (
    *(option for option in SDK_CLIENT if option[0] != "grpc.service_config"),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 8_000),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A router to call, or those behind `dns:///host:port`.

    `insecure` means plaintext, which only loopback allows.
    """

    address: str
    api_key: str | None = field(repr=False)
    ca: Path | bytes | None
    insecure: bool

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()


def resolve(
    address: str | None,
    api_key: str | None,
    ca: Path | str | bytes | None,
    insecure: bool | None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Fill in from the environment what was not given.

    `ca` is a PEM file's path or its bytes. Without one a loopback address is called in plaintext
    and any other by TLS with the system's authorities; `insecure` overrides that, never beyond
    loopback. ConfigError names what is missing or malformed.
    """
    address = address or environ.get(ADDRESS)
    if not address:
        raise ConfigError(f"no router to call: give an address or set {ADDRESS} (host:port)")
    api_key = api_key or environ.get(API_KEY) or None
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ConfigError(f"the API key ({API_KEY}) holds characters that no key has")
    ca = ca or environ.get(CA) or None
    loopback = is_loopback(address)
    if insecure is None:
        insecure = ca is None and loopback
    elif insecure and not loopback:
        raise ConfigError(f"refusing to send a key to {address} without TLS: it is not loopback")
    return Settings(
        address=address,
        api_key=api_key,
        ca=Path(ca) if isinstance(ca, str) else ca,
        insecure=insecure,
    )
