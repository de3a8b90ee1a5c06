"""`python -m services.router --processes N`: several routers behind one port."""

import asyncio
import os
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.router.config import RouterConfig
from services.router.processes import config_of
from services.stack.ports import free_ports
from tests.router_harness import MODEL, RouterCaller
from tests.scripted_worker import ScriptedWorker, answer
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.config import load
from tidemill.rpc.channel import sdk_aio_channel
from tidemill.rpc.options import SDK_CLIENT
from tidemill.rpc.probe import probe
from tidemill.rpc.tls import TlsFiles

pytestmark = pytest.mark.redis

REPOSITORY = Path(__file__).parents[3]
COUNT = 2
CHANNELS = 64
ROUNDS = 3
OWN_CONNECTION = (*SDK_CLIENT, ("grpc.use_local_subchannel_pool", 1))
HEALTH = "/grpc.health.v1.Health/Check"


@dataclass
class Group:
    """A parent with its processes; `own` and `metrics` are the ports of process 0."""

    path: Path
    address: str
    own: int
    metrics: int
    ca: Path
    parent: asyncio.subprocess.Process

    def channel(self, number: int | None = None) -> grpc.aio.Channel:
        """A connection of its own: to process `number`, else to whichever gets it."""
        address = self.address if number is None else f"127.0.0.1:{self.own + number}"
        return sdk_aio_channel(address, ca=self.ca, options=OWN_CONNECTION)

    async def health(self, number: int, timeout_s: float = 30.0) -> str:
        """What one process says."""
        async with self.channel(number) as channel:
            return await probe(channel, timeout_s=timeout_s)

    async def until_health(self, number: int, status: str, within_s: float = 60.0) -> None:
        """Wait for a process to say so."""
        async with asyncio.timeout(within_s):
            while await self.health(number) != status:  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.05)

    def probes(self, number: int) -> int:
        """Health checks that a process has answered so far."""
        url = f"http://127.0.0.1:{self.metrics + number}/metrics"
        page = urllib.request.urlopen(url, timeout=60).read().decode()
        samples = (
            each for family in text_string_to_metric_families(page) for each in family.samples
        )
        return sum(
            int(sample.value)
            for sample in samples
            if sample.name == "tidemill_rpc_handled_total" and sample.labels["method"] == HEALTH
        )

    def pids(self) -> list[int]:
        """The processes' ids, oldest first."""
        task = Path(f"/proc/{self.parent.pid}/task/{self.parent.pid}/children")
        return sorted(int(each) for each in task.read_text().split())


@pytest.fixture
async def worker(tls_files: Callable[[str], TlsFiles]) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("both-0", "both", answer([50, 51]))
    await worker.start(tls_files("worker"))
    yield worker
    await worker.vanish()


@pytest.fixture
async def group(
    write: Callable[..., Path],
    worker: ScriptedWorker,
    dev_certs: Path,
    free_port: Callable[[], int],
) -> AsyncIterator[Group]:
    """Two processes that serve; the parent must end well unless a test has ended it."""
    own, metrics = free_ports(COUNT), free_ports(COUNT)
    path = write(
        address=f"127.0.0.1:{free_port()}",
        workers=worker.endpoint,
        router_id="router",
        metrics=f'own_address = "127.0.0.1:{own}"\nmetrics_address = "127.0.0.1:{metrics}"',
    )
    parent = await _launch(path)
    assert parent.stdout is not None
    said = (await parent.stdout.readline()).decode()
    assert said.startswith("router listening on "), said
    made = Group(path, said.split()[-1], own, metrics, dev_certs / "ca.pem", parent)
    yield made
    if parent.returncode is None:
        parent.send_signal(signal.SIGTERM)
    await parent.wait()


async def _launch(path: Path) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.router", "--config", str(path)),
        *("--processes", str(COUNT)),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
    )


async def refusal(path: Path) -> str:
    """What such a group says on standard error on its way out."""
    command = (sys.executable, "-m", "services.router", "--config", str(path), "--processes", "2")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, cwd=REPOSITORY, stderr=pipe)
    _, stderr = await process.communicate()
    assert process.returncode == 2, stderr.decode()
    return stderr.decode()


async def gone(pid: int, within_s: float = 60.0) -> None:
    """Wait until there is no such process."""
    async with asyncio.timeout(within_s):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)


def ask(request_id: str) -> router_pb2.GenerateRequest:
    return router_pb2.GenerateRequest(request_id=request_id, model=MODEL, prompt="hello")


async def test_connections_to_one_port_are_dealt_out_among_the_processes(group: Group) -> None:
    before = [group.probes(number) for number in range(COUNT)]
    for _ in range(ROUNDS):  # 64 alone would miss the bounds once in sixty times by chance
        channels = [group.channel() for _ in range(CHANNELS)]
        assert set(await asyncio.gather(*map(probe, channels))) == {"SERVING"}
        await asyncio.gather(*(channel.close() for channel in channels))
    taken = [group.probes(number) - before[number] for number in range(COUNT)]
    assert sum(taken) == ROUNDS * CHANNELS
    assert 0.35 <= min(taken) / sum(taken) <= max(taken) / sum(taken) <= 0.65, taken

    assert f"cannot listen on {group.address}: Address already in use" in await refusal(group.path)


async def test_each_process_has_a_name_a_spool_and_a_health_of_its_own(group: Group) -> None:
    spools = {each.name for each in (group.path.parent / "spool").iterdir()}
    assert spools == {"router-0", "router-1"}
    younger = group.pids()[1]
    os.kill(younger, signal.SIGSTOP)
    try:
        assert await group.health(0) == "SERVING"
        assert await group.health(1, timeout_s=1.0) == "DEADLINE_EXCEEDED"
    finally:
        os.kill(younger, signal.SIGCONT)
    assert [await group.health(number) for number in range(COUNT)] == ["SERVING"] * COUNT

    pids = group.pids()
    group.parent.send_signal(signal.SIGTERM)
    assert await group.parent.wait() == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def test_a_process_that_dies_is_started_again_while_the_other_serves(group: Group) -> None:
    elder, younger = group.pids()
    async with group.channel(0) as channel:
        router = RouterCaller(channel)
        router.key = await router.make_tenant("acme")
        os.kill(younger, signal.SIGKILL)
        await gone(younger)
        assert (await router.generate(ask("r1"))).completed.usage.completion_tokens == 2
        await group.until_health(1, "SERVING")
        assert (await router.generate(ask("r2"))).completed.usage.completion_tokens == 2
    assert elder in group.pids()
    assert len(group.pids()) == COUNT


async def test_sighup_replaces_all_processes_and_they_end_with_their_parent(group: Group) -> None:
    before = group.pids()
    group.parent.send_signal(signal.SIGHUP)
    async with asyncio.timeout(60):
        while set(before) & set(group.pids()) or len(group.pids()) < COUNT:
            # 0 is replaced first, and 1 goes only when the new 0 listens, which then stays.
            assert "SERVING" in [await group.health(number) for number in (0, 1, 0)]
            await asyncio.sleep(0.05)
    await group.until_health(1, "SERVING")

    pids = group.pids()
    group.parent.kill()
    await asyncio.gather(*map(gone, pids))


async def test_what_keeps_the_processes_from_starting_is_said_once(
    write: Callable[..., Path], free_port: Callable[[], int]
) -> None:
    said = await refusal(write(ledger_url=f"redis://127.0.0.1:{free_port()}/0"))
    assert said.count("ledger Redis cannot be used") == 1
    assert "tidemill router: process 0 ended with status 2" in said


def test_each_process_gets_its_own_ports_and_name(write: Callable[..., Path]) -> None:
    extra = 'own_address = "127.0.0.1:7010"\nmetrics_address = "[::1]:9100"'
    config = load(RouterConfig, "router", write(router_id="r", metrics=extra), {})
    third = config_of(config, 2)
    assert third.server.address == config.server.address
    assert third.server.own_address == "127.0.0.1:7012"
    assert third.server.metrics_address == "[::1]:9102"
    assert third.money.router_id == "r-2"
    nameless = config_of(load(RouterConfig, "router", write(), {}), 2)
    assert nameless.server.own_address is nameless.server.metrics_address is None
    assert nameless.money.router_id is None
