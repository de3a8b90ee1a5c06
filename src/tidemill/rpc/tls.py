"""TLS between processes: who may listen where, and which role a certificate stands for.

A certificate's roles are its DNS names under tidemill.internal: `decode.tidemill.internal` makes
its holder a decode worker. All of them are signed by the deployment's own authority.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from tidemill.errors import ConfigError
from tidemill.rpc.address import is_loopback

_ROLE_DOMAIN = ".tidemill.internal"


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of one process: its certificate, its private key, the authority it trusts."""

    cert: Path
    key: Path
    ca: Path


def role_name(role: str) -> str:
    """The DNS name that stands for `role` in a certificate."""
    return role + _ROLE_DOMAIN


def roles_in_names(names: Iterable[str]) -> frozenset[str]:
    """The roles that a certificate with these DNS names stands for."""
    labels = (name.removesuffix(_ROLE_DOMAIN) for name in names if name.endswith(_ROLE_DOMAIN))
    return frozenset(label for label in labels if label and "." not in label)


def roles_of_peer(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """Roles of the far side of a call, by `context.auth_context()`; empty without mutual TLS."""
    names = auth_context.get("x509_subject_alternative_name", ())
    return roles_in_names(name.decode("utf-8", "replace") for name in names)


def server_credentials(tls: TlsFiles, *, client_certs: bool) -> grpc.ServerCredentials:
    """Credentials to listen with; `client_certs` demands one from every caller (mutual TLS)."""
    pair = (_read(tls.key), _read(tls.cert))
    return grpc.ssl_server_credentials(
        [pair],
        root_certificates=_read(tls.ca) if client_certs else None,
        require_client_auth=client_certs,
    )


def channel_credentials(
    ca: Path | bytes | None, *, cert: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """Credentials to call with; `ca` None trusts the system's authorities."""
    return grpc.ssl_channel_credentials(
        root_certificates=_read(ca) if isinstance(ca, Path) else ca,
        private_key=_read(key) if key else None,
        certificate_chain=_read(cert) if cert else None,
    )


def check_bind(address: str, *, tls: bool) -> None:
    """Refuse to listen beyond this machine without TLS. Raises ConfigError."""
    if not tls and not is_loopback(address):
        raise ConfigError(f"refusing to listen on {address} without TLS: it is not loopback")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
