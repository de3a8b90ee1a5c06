import asyncio
import stat
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tidemill.certs import ROLES, make_dev_certs
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.probe import probe
from tidemill.rpc.server import RpcServer, ServerConfig
from tidemill.rpc.tls import TlsFiles


def in_directory(directory: Path, role: str) -> TlsFiles:
    return TlsFiles(directory / f"{role}.pem", directory / f"{role}.key", directory / "ca.pem")


def test_writes_one_pair_per_role_and_nothing_else(tmp_path: Path) -> None:
    make_dev_certs(tmp_path / "certs")
    expected = {f"{name}.{kind}" for name in ("ca", *ROLES) for kind in ("pem", "key")}
    assert {path.name for path in (tmp_path / "certs").iterdir()} == expected


def test_keys_are_readable_by_their_owner_alone_even_when_replaced(tmp_path: Path) -> None:
    (tmp_path / "router.key").write_text("open to all")
    (tmp_path / "router.key").chmod(0o666)
    make_dev_certs(tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.key")}
    assert modes == {0o600}


def test_certificate_names_its_roles_this_machine_and_the_hosts_asked_for(tmp_path: Path) -> None:
    make_dev_certs(tmp_path, hosts=("node-7", "10.1.2.3"))
    cert = x509.load_pem_x509_certificate((tmp_path / "worker.pem").read_bytes())
    names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [
        "prefill.tidemill.internal",
        "decode.tidemill.internal",
        "localhost",
        "node-7",
    ]
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "::1", "10.1.2.3"}


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_shakes_hands_with_each_other(
    tls_files: Callable[[str], TlsFiles], role: str
) -> None:
    config = ServerConfig(tls=tls_files(role), drain_s=0)
    server = RpcServer(config, public=False, readiness=lambda: None)
    await server.start()
    try:
        for caller in ROLES:
            for proven in ROLES[role]:
                tls = tls_files(caller)
                async with internal_channel(server.address, role=proven, tls=tls) as channel:
                    assert await probe(channel) == "SERVING"
    finally:
        await server.drain()


async def test_an_impostor_role_is_refused_by_the_caller(
    tls_files: Callable[[str], TlsFiles],
) -> None:
    config = ServerConfig(tls=tls_files("cache"), drain_s=0)
    server = RpcServer(config, public=False, readiness=lambda: None)
    await server.start()
    try:
        tls = tls_files("decode")
        async with internal_channel(server.address, role="prefill", tls=tls) as channel:
            assert await probe(channel, timeout_s=30) == "UNAVAILABLE"
    finally:
        await server.drain()


async def test_a_foreign_authority_is_refused_on_both_sides(
    tls_files: Callable[[str], TlsFiles], tmp_path: Path
) -> None:
    make_dev_certs(tmp_path)
    ours, foreign = tls_files("decode"), in_directory(tmp_path, "decode")
    half_foreign = TlsFiles(cert=foreign.cert, key=foreign.key, ca=ours.ca)
    config = ServerConfig(tls=tls_files("prefill"), drain_s=0)
    server = RpcServer(config, public=False, readiness=lambda: None)
    await server.start()
    try:
        for tls in (foreign, half_foreign):
            async with internal_channel(server.address, role="prefill", tls=tls) as channel:
                assert await probe(channel, timeout_s=30) == "UNAVAILABLE"
        without_certificate = grpc.ssl_channel_credentials(ours.ca.read_bytes())
        async with grpc.aio.secure_channel(server.address, without_certificate) as channel:
            assert await probe(channel, timeout_s=30) == "UNAVAILABLE"
        await asyncio.sleep(0)
    finally:
        await server.drain()
