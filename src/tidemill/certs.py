"""Certificates for development: an authority of one's own and one certificate for each role.

Production brings certificates of its own; what Tidemill asks of them is only the role's DNS name
(tidemill.rpc.tls).
"""

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

ROLES: dict[str, tuple[str, ...]] = {
    "router": ("router",),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "cache": ("cache",),
    "worker": ("prefill", "decode"),  # one process that does both
    "redis": ("redis",),
}

_VALID_FOR = timedelta(days=365)
_CLOCK_SKEW = timedelta(minutes=5)
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


def make_dev_certs(directory: Path, hosts: Sequence[str] = ()) -> None:
    """Write ca.pem, ca.key and, for each of ROLES, <name>.pem and <name>.key into `directory`.

    Each certificate is good for its roles, for this machine, and for `hosts` (names or addresses)
    for a year. Keys are EC P-256, readable by their owner alone. Whatever stood there under these
    names is replaced.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    now = datetime.now(UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca = _make_ca(ca_key, now)
    _write(directory / "ca.pem", ca.public_bytes(serialization.Encoding.PEM), mode=0o644)
    _write(directory / "ca.key", _pem(ca_key), mode=0o600)
    for name, roles in ROLES.items():
        key = ec.generate_private_key(ec.SECP256R1())
        names = [f"{role}.tidemill.internal" for role in roles] + [*_LOCAL_HOSTS, *hosts]
        cert = _make_leaf(name, names, key.public_key(), ca=ca, ca_key=ca_key, now=now)
        _write(directory / f"{name}.pem", cert.public_bytes(serialization.Encoding.PEM), mode=0o644)
        _write(directory / f"{name}.key", _pem(key), mode=0o600)


def _make_ca(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Tidemill development CA")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _builder(name, name, key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _make_leaf(
    name: str,
    hosts: Sequence[str],
    public_key: ec.EllipticCurvePublicKey,
    *,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tidemill {name}")])
    both_ways = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        _builder(subject, ca.subject, public_key, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_ways), critical=False)
        .add_extension(x509.SubjectAlternativeName(_general_names(hosts)), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _VALID_FOR)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys(hosts):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return names


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, data: bytes, *, mode: int) -> None:
    """Write with `mode` from the first byte on: a key is never readable by others."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
