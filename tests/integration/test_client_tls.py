"""The SDK over TLS, with the development authority."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from tests.scripted_router import ScriptedRouter, answer
from tidemill.api.router.v1.router_service_pb2_grpc import add_RouterServiceServicer_to_server
from tidemill.client import AsyncClient, Client, RetryPolicy
from tidemill.errors import Unavailable
from tidemill.rpc.options import PUBLIC_SERVER
from tidemill.rpc.tls import TlsFiles, server_credentials

ONCE = RetryPolicy(max_retries=0)


@pytest.fixture
async def address(tls_files: Callable[[str], TlsFiles]) -> AsyncIterator[str]:
    server = grpc.aio.server(options=PUBLIC_SERVER)
    add_RouterServiceServicer_to_server(ScriptedRouter([answer("safe")]), server)
    credentials = server_credentials(tls_files("router"), client_certs=False)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    yield f"localhost:{port}"
    await server.stop(0)


async def test_both_clients_call_by_tls_where_an_authority_is_given(
    address: str, dev_certs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEMILL_CA", str(dev_certs / "ca.pem"))
    monkeypatch.setenv("TIDEMILL_ADDRESS", address)
    async with AsyncClient() as client:
        assert (await client.generate("p", model="demo")).text == "safe"

    def ask() -> str:
        with Client(ca=(dev_certs / "ca.pem").read_bytes()) as client:
            return client.generate("p", model="demo").text

    assert await asyncio.to_thread(ask) == "safe"


@pytest.mark.parametrize("insecure", [True, False])
async def test_neither_plaintext_nor_an_unknown_authority_gets_an_answer(
    address: str, insecure: bool
) -> None:
    async with AsyncClient(address, insecure=insecure, retry=ONCE) as client:
        with pytest.raises(Unavailable):
            await client.generate("p", model="demo", timeout=5.0)
