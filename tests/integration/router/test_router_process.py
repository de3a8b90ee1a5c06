"""`python -m services.router` as an operator runs it."""

import asyncio
import json
import os
import re
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import DURABLE, MODEL, RouterCaller
from tests.scripted_worker import ScriptedWorker, answer
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

REPOSITORY = Path(__file__).parents[3]
Write = Callable[..., Path]


async def launch(path: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.router",
        "--config",
        str(path),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def refusal(path: Path) -> str:
    """What it says on its way out."""
    process = await launch(path)
    _, stderr = await process.communicate()
    assert process.returncode == 2, stderr.decode()
    lines = [line for line in stderr.decode().splitlines() if line.startswith("tidemill router:")]
    assert len(lines) == 1, stderr.decode()
    return lines[0]


@pytest.mark.parametrize("own", [True, False])
async def test_with_cores_of_its_own_its_threads_do_not_interrupt_one_another(
    write: Write, *, own: bool
) -> None:
    process = await launch(write(extra=f"own_cores = {json.dumps(own)}"))
    assert process.stdout is not None
    assert "listening" in (await process.stdout.readline()).decode()
    threads = Path(f"/proc/{process.pid}/task").iterdir()
    policies = {os.sched_getscheduler(int(thread.name)) for thread in threads}
    process.kill()
    await process.communicate()
    assert (os.SCHED_BATCH in policies) is own
    assert os.sched_getscheduler(0) != os.SCHED_BATCH


async def test_it_serves_over_tls_shows_metrics_and_stops_at_sigterm(
    write: Write,
    dev_certs: Path,
    tls_files: Callable[[str], TlsFiles],
    free_port: Callable[[], int],
) -> None:
    worker = ScriptedWorker("both-0", "both", answer([50, 51]))
    await worker.start(tls_files("worker"))
    metrics_port = free_port()
    process = await launch(
        write(workers=worker.endpoint, metrics=f'metrics_address = "127.0.0.1:{metrics_port}"')
    )
    assert process.stdout is not None
    said = (await process.stdout.readline()).decode()
    found = re.search(r"listening on (\S+)", said)
    assert found is not None
    async with sdk_aio_channel(found[1], ca=dev_certs / "ca.pem") as channel:
        router = RouterCaller(channel)
        router.key = await router.make_tenant("acme")
        request = router_pb2.GenerateRequest(request_id="r1", model=MODEL, prompt="hello")
        async with asyncio.timeout(60):
            while (heard := await router.generate(request)).error is not None:
                assert heard.error.reason == "NO_WORKERS"
                await asyncio.sleep(0.1)
        assert heard.completed.usage.completion_tokens == 2
        url = f"http://127.0.0.1:{metrics_port}/metrics"
        page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        assert f'tidemill_router_completion_tokens_total{{model="{MODEL}"}} 2.0' in page
        assert "tidemill_rpc_handled_total" in page
    process.send_signal(signal.SIGTERM)
    _, stderr = await process.communicate()
    assert process.returncode == 0
    await worker.vanish()
    lines = [json.loads(line) for line in stderr.decode().splitlines() if line.startswith("{")]
    (settled,) = [line for line in lines if line["message"] == "settled"]
    assert settled["receipt"]["amount_nano"] == heard.completed.receipt.amount_nano
    assert settled["receipt"]["tenant_id"] == "acme"
    assert "hello" not in stderr.decode()
    assert router.key not in stderr.decode()


async def test_what_keeps_it_from_starting_is_one_clear_line(
    write: Write, redis_server: Callable[..., RedisProcess], free_port: Callable[[], int]
) -> None:
    assert "max_queue" in await refusal(write(extra="max_queue = 3"))
    assert "tidemill.toml" in await refusal(write(extra="max_queue = 3"))
    assert "pepper" in await refusal(write(pepper="short"))
    assert "signing.pem" in await refusal(write(signing_key="no key"))
    assert "deepseek-v9" in await refusal(write(price_model="deepseek-v9"))
    assert "role@host:port" in await refusal(write(workers="somewhere"))
    nobody = f"redis://127.0.0.1:{free_port()}/0"
    assert "ledger Redis cannot be used" in await refusal(write(ledger_url=nobody))
    wrong = redis_server(**DURABLE)
    stranger = wrong.url.replace(wrong.password, "wrong")
    said = await refusal(write(ledger_url=stranger))
    assert "ledger Redis cannot be used" in said
    assert "wrong" not in said
    everysec = redis_server(**{**DURABLE, "appendfsync": "everysec"})
    assert "appendfsync" in await refusal(write(ledger_url=everysec.url))


async def test_a_port_in_use_is_named(write: Write) -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert f"127.0.0.1:{port}" in await refusal(write(address=f"127.0.0.1:{port}"))
    server.close()
    await server.wait_closed()


async def test_plaintext_beyond_loopback_is_refused(write: Write) -> None:
    everywhere = "0.0.0.0"  # noqa: S104 - which is what must be refused
    path = write(address=f"{everywhere}:0")
    path.write_text(re.sub(r"drain_s = 0.2\ntls = .*", "drain_s = 0.2", path.read_text()))
    assert everywhere in await refusal(path)
