"""Channels: between our processes with a checked role, and from the SDK to a router."""

import json
from pathlib import Path
from typing import Any, Final

import grpc

from tidemill.errors import ConfigError
from tidemill.rpc.address import is_loopback, is_name_of_many
from tidemill.rpc.options import BULK_CLIENT, INTERNAL_CLIENT, SDK_CLIENT, Options
from tidemill.rpc.tls import TlsFiles, channel_credentials, role_name

# Routers are replaced one after the other: the first must be called again before the second goes.
_SOON_BACK: Final = {
    "grpc.initial_reconnect_backoff_ms": 200,
    "grpc.max_reconnect_backoff_ms": 1_000,
}


def internal_channel(
    address: str, *, role: str, tls: TlsFiles, options: Options = INTERNAL_CLIENT
) -> grpc.aio.Channel:
    """A mutual-TLS channel to a process that must hold a certificate of `role`.

    The role is verified instead of the host's name, so a worker may move between hosts, and a
    process with another role's certificate cannot stand in for it.
    """
    credentials = channel_credentials(tls.ca, cert=tls.cert, key=tls.key)
    named = (*options, ("grpc.ssl_target_name_override", role_name(role)))
    return grpc.aio.secure_channel(address, credentials, options=named)


def bulk_channel(address: str, *, role: str, tls: TlsFiles) -> grpc.aio.Channel:
    """As internal_channel, for blocks and hand-overs: large messages, perhaps from afar."""
    return internal_channel(address, role=role, tls=tls, options=BULK_CLIENT)


def sdk_channel(
    address: str,
    *,
    ca: Path | bytes | None = None,
    insecure: bool = False,
    options: Options = SDK_CLIENT,
) -> grpc.Channel:
    """A channel to a router's public port, or to several routers' in turn.

    Of `dns:///host:port` every address is connected to and calls go round, those of routers that
    cannot be reached left out; any other address is one connection. Raises ConfigError for
    plaintext beyond loopback.
    """
    options = _in_turn(address, options)
    if insecure:
        _check_plaintext(address)
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, channel_credentials(ca), options=options)


def sdk_aio_channel(
    address: str,
    *,
    ca: Path | bytes | None = None,
    insecure: bool = False,
    options: Options = SDK_CLIENT,
) -> grpc.aio.Channel:
    """As sdk_channel, for asyncio."""
    options = _in_turn(address, options)
    if insecure:
        _check_plaintext(address)
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, channel_credentials(ca), options=options)


def _in_turn(address: str, options: Options) -> Options:
    if not is_name_of_many(address):
        return options
    rest = dict(options)
    config: dict[str, Any] = json.loads(str(rest.pop("grpc.service_config", "{}")))
    config["loadBalancingConfig"] = [{"round_robin": {}}]
    return (
        *(rest | _SOON_BACK).items(),
        ("grpc.service_config", json.dumps(config)),
    )


def _check_plaintext(address: str) -> None:
    if not is_loopback(address):
        raise ConfigError(f"refusing to send a key to {address} without TLS: it is not loopback")
