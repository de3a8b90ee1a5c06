import asyncio
import sys
from collections.abc import Callable

import pytest

from tests.unit.rpc.serving import serving
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.tls import TlsFiles


async def run_probe(*arguments: str) -> tuple[int | None, str]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tidemill.rpc.probe", *arguments, stdout=pipe, stderr=pipe
    )
    out, err = await process.communicate()
    return process.returncode, (out + err).decode().strip()


@pytest.mark.parametrize("why", [None, "starting"])
async def test_the_exit_status_is_the_health_of_the_port(
    why: str | None, tls_files: Callable[[str], TlsFiles]
) -> None:
    tls = tls_files("cache")
    config = ServerConfig(tls=tls, drain_s=0)
    files = ["--role=cache", f"--cert={tls.cert}", f"--key={tls.key}", f"--ca={tls.ca}"]
    async with serving(config, public=False, readiness=lambda: why) as server:
        found = await run_probe(server.address, *files)
    assert found == ((0, "SERVING") if why is None else (1, "NOT_SERVING"))


async def test_a_plain_port_on_loopback_can_be_asked() -> None:
    async with serving() as server:
        assert await run_probe(server.address, "--insecure") == (0, "SERVING")


async def test_what_cannot_be_asked_is_status_2() -> None:
    code, text = await run_probe("192.0.2.1:1", "--insecure")
    assert code == 2
    assert "without TLS" in text
    code, text = await run_probe("127.0.0.1:1", "--role=cache")
    assert (code, text) == (2, "--role needs --cert, --key and --ca")
