"""Worker processes as operators run them: registry, load stream, drain, and kill -9."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis
from torch import Tensor

from tests.redis_process import RedisProcess
from tests.stopwatch import stopwatch
from tests.worker_harness import (
    SCOPE,
    RouterSide,
    Tls,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    slow_down,
    worker_at,
)
from tidemill.api.worker.v1 import worker_service_pb2 as pb
from tidemill.api.worker.v1.worker_service_pb2_grpc import WorkerServiceStub
from tidemill.blocks import block_names, chain_hashes, root_hash
from tidemill.engine.scheduler import Step
from tidemill.errors import WorkerLost
from tidemill.rpc.channel import internal_channel
from tidemill.worker.config import RegistryConfig, Role
from tidemill.worker.process import RunningWorker

START_S = 60.0
REPOSITORY = Path(__file__).parents[2]


@asynccontextmanager
async def worker_stub(running: RunningWorker, tls: Tls) -> AsyncIterator[Any]:
    channel = internal_channel(running.address, role=running.worker.role.value, tls=tls("router"))
    try:
        yield cast(Any, WorkerServiceStub(channel))
    finally:
        await channel.close()


async def test_a_worker_describes_itself(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files, worker_id="p7") as worker,
        worker_stub(worker, tls_files) as stub,
    ):
        said = await stub.DescribeWorker(pb.DescribeWorkerRequest())
        assert (said.worker_id, said.role, said.model) == ("p7", pb.WORKER_ROLE_PREFILL, "tiny")
        assert said.epoch == worker.worker.epoch
        assert (said.layout.num_layers, said.layout.latent_dim) == (3, 48)
        assert said.layout.model_digest == worker.worker.engine.layout.model_digest
        assert (said.max_context_tokens, said.vocab_size) == (1024, 512)
        assert list(said.kv_transports) == ["grpc"]


async def test_load_is_pushed_on_change_and_at_least_each_second(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
        worker_stub(prefill, tls_files) as stub,
    ):
        slow_down(prefill, 0.05)
        loads: list[pb.WatchLoadResponse] = []

        async def watch() -> None:
            async for load in stub.WatchLoad(pb.WatchLoadRequest(min_interval_ms=20)):
                loads.append(load)  # noqa: PERF401 - read below while it grows

        watching = asyncio.create_task(watch())
        await eventually(lambda: len(loads) == 1)
        started = time.monotonic()
        async with stopwatch() as passing:
            await eventually(lambda: len(loads) == 2)
        assert time.monotonic() - started > 0.5
        assert passing.seconds < 2.0
        await router.ask(make_start(prompt_of(640), prefill=prefill))
        await eventually(lambda: loads[-1].open_handovers == 0)
        assert [load.sequence for load in loads] == list(range(1, len(loads) + 1))
        assert {load.epoch for load in loads} == {prefill.worker.epoch}
        queued = [load.queued_uncached_tokens for load in loads]
        assert 0 < max(queued) <= 640
        assert sum(a != b for a, b in pairwise(queued)) >= 3
        assert max(load.queued_attention_pairs for load in loads) == 640 * 641 // 2
        assert loads[-1].queued_attention_pairs == 0
        assert 0 < loads[-1].prefill_tokens_per_s < loads[0].prefill_tokens_per_s, (
            "warm-up was quick"
        )
        assert decode.worker.thread.pace.decode_step_us > 0
        assert max(load.prefilling for load in loads) == 1
        tiers = [load.tiers[0] for load in loads]
        assert min(tier.free_blocks for tier in tiers) == 96 - 10
        assert tiers[-1].free_blocks == tiers[-1].total_blocks == 96
        prefill.worker.draining = True
        await watching
        assert loads[-1].draining


async def test_blocks_are_told_as_they_come_and_go_and_a_stream_is_resumed(
    model_dir: Path, tls_files: Tls
) -> None:
    prompt, later = prompt_of(300), prompt_of(1000, seed=2)
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
        worker_stub(prefill, tls_files) as stub,
    ):
        layout = prefill.worker.engine.layout
        root = root_hash(layout.model_digest, layout.kv_format, SCOPE)
        first = stub.WatchKv(pb.WatchKvRequest())
        told = await first.read()
        assert (told.epoch, told.resets, list(told.changes)) == (prefill.worker.epoch, True, [])
        await router.ask(make_start(prompt, prefill=prefill))
        names: list[int] = []
        while len(names) < 4:
            told = await first.read()
            assert {(each.tier, each.removed) for each in told.changes} == {
                (pb.KV_TIER_DEVICE, False)
            }
            names += [name for change in told.changes for name in change.blocks]
        assert names == block_names(chain_hashes(root, prompt))
        first.cancel()
        await router.ask(make_start(later, "r2", prefill=prefill))
        resumed = pb.WatchKvRequest(epoch=told.epoch, after_sequence=told.sequence)
        missed = await stub.WatchKv(resumed).read()
        assert (missed.sequence, missed.resets) == (told.sequence + 1, False)
        again = await stub.WatchKv(pb.WatchKvRequest(epoch=told.epoch - 1)).read()
        assert again.resets
        (change,) = again.changes
        assert (
            set(names) < set(change.blocks) == set(names + block_names(chain_hashes(root, later)))
        )
        watch = stub.WatchKv(pb.WatchKvRequest())
        assert (await watch.read()).resets
        prefill.worker.draining = True
        assert await watch.read() == grpc.aio.EOF


async def test_a_stuck_step_fails_health_until_it_ends_and_the_log_says_which(
    model_dir: Path, tls_files: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = threading.Event()
    go_on = threading.Event()
    async with (
        worker_at(Role.BOTH, model_dir, tls_files, stall_s=0.3) as running,
        router_of(running, tls_files) as router,
    ):
        stub: Any = WorkerServiceStub(router.channel)
        runner = running.worker.engine._runner
        forward = runner.forward

        def hang_with_company(step: Step) -> Tensor:
            if step.decodes and step.chunks and not stuck.is_set():
                stuck.set()
                assert go_on.wait(60)
            return forward(step)

        runner.forward = hang_with_company  # type: ignore[method-assign]  # the model hangs
        try:
            first = await router.begin(make_start(prompt_of(50), "r1", max_tokens=20))
            await first.until("prefill_done")
            second = await router.begin(make_start(prompt_of(60), "r2", max_tokens=3))
            await eventually(stuck.is_set)
            await eventually(lambda: "a step is stuck" in caplog.messages)
            await health_turns(router.channel, "NOT_SERVING")
            load = await anext(aiter(stub.WatchLoad(pb.WatchLoadRequest())))
            assert load.step_age_ms > 300
        finally:
            go_on.set()
        assert len((await first.finish()).tokens) == 20
        assert len((await second.finish()).tokens) == 3
        await eventually(lambda: "the stuck step has ended" in caplog.messages)
        await health_turns(router.channel, "SERVING")
        await settled(running)
    (record,) = [each for each in caplog.records if each.message == "a step is stuck"]
    facts = vars(record)
    assert (facts["decodes"], facts["prompt_tokens"], facts["longest_context"]) == (1, 60, 60)
    assert facts["sequences"] == ["decode r1/1/1", "decode r2/1/1"]
    assert "hang_with_company" in facts["where"]


async def health_turns(channel: grpc.aio.Channel, wanted: str) -> None:
    """Wait until grpc.health.v1 says so; it asks the worker every second."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(60):
        async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
            if health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) == wanted:
                return


async def test_a_leaked_block_fails_readiness(model_dir: Path, tls_files: Tls) -> None:
    async with worker_at(Role.BOTH, model_dir, tls_files) as running:
        worker = running.worker
        assert worker.readiness() is None
        leaked = worker.engine.pool.allocate(1)
        worker.check_pool()
        assert "1 blocks are held" in (worker.readiness() or "")
        worker.engine.pool.release(leaked)
        worker.check_pool()
        assert worker.readiness() is None


async def test_a_drain_ends_what_outlasts_it_with_a_final(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.BOTH, model_dir, tls_files) as running,
        router_of(running, tls_files) as router,
    ):
        slow_down(running, 0.01)
        attempts = [
            await router.begin(make_start(prompt_of(50), name, max_tokens=max_tokens))
            for name, max_tokens in (("short", 4), ("long", 900))
        ]
        for attempt in attempts:
            await attempt.until("prefill_done")
        draining = asyncio.create_task(running.drain())
        short, long = [await attempt.finish() for attempt in attempts]
        await draining
        assert short.reason == "LENGTH"
        assert long.reason == "SERVER_FAULT"
        assert long.final.generated_tokens == len(long.tokens) < 900
        await settled(running)


@pytest.mark.redis
async def test_the_registry_knows_live_workers_and_survives_its_redis(
    model_dir: Path, tls_files: Tls, redis_server: Callable[..., RedisProcess]
) -> None:
    server = redis_server()
    config = RegistryConfig(server.url, heartbeat_s=0.1, ttl_s=0.5)
    redis = Redis.from_url(server.url, decode_responses=True)
    async with worker_at(Role.DECODE, model_dir, tls_files, registry=config) as worker:
        await eventually(lambda: bool(worker.worker.registered))
        entry = await redis.hgetall("tm:worker:decode")
        assert entry["address"] == worker.address
        assert (entry["role"], entry["model"]) == ("decode", "tiny")
        assert entry["epoch"] == str(worker.worker.epoch)
        assert entry["draining"] == "0"
        assert 0 < await redis.pttl("tm:worker:decode") <= 500
        server.kill()
        await eventually(lambda: metric(worker, "registry_errors_total") > 0)
        assert worker.worker.readiness() is None
        server.start()
        await eventually(lambda: bool(worker.worker.registered))
        await redis.aclose()
        redis = Redis.from_url(server.url)
        assert await redis.exists("tm:worker:decode")
    assert not await redis.exists("tm:worker:decode")
    await redis.aclose()


class WorkerProcess:
    """`python -m services.{service}` with a config file, on a known port."""

    def __init__(self, service: str, path: Path, port: int, *arguments: str) -> None:
        self.address = f"127.0.0.1:{port}"
        self._command = [sys.executable, "-m", f"services.{service}", "--config", str(path)]
        self._command += arguments
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=REPOSITORY,
            stderr=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )

    async def wait_serving(self) -> None:
        async with asyncio.timeout(START_S):
            while True:
                assert self.process is not None
                assert self.process.stderr is not None
                line = await self.process.stderr.readline()
                assert line, "the worker ended before it served"
                if json.loads(line).get("message") == "serving":
                    return

    async def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            os.kill(self.process.pid, number)
        await self.process.communicate()
        return self.process.returncode or 0


def config_file(
    directory: Path, service: str, model_dir: Path, certs: Path, *, port: int, extra: str = ""
) -> Path:
    path = directory / f"{service}.toml"
    path.write_text(
        f"""
[{service}]
worker_id = "{service}-0"
model = "tiny"
model_dir = "{model_dir}"
{extra}
[{service}.engine]
num_blocks = 96
step_tokens = 16
num_threads = 1
[{service}.server]
address = "127.0.0.1:{port}"
drain_s = 0.5
[{service}.server.tls]
cert = "{certs}/{service}.pem"
key = "{certs}/{service}.key"
ca = "{certs}/ca.pem"
"""
    )
    return path


async def test_a_killed_prefill_worker_is_a_typed_error_within_two_seconds(
    model_dir: Path,
    tls_files: Tls,
    dev_certs: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    path = config_file(tmp_path, "prefill", model_dir, dev_certs, port=port)
    process = WorkerProcess("prefill", path, port)
    await process.start()
    async with (
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
    ):
        await process.wait_serving()
        start = make_start(prompt_of(1000))
        start.prefill.worker_id, start.prefill.address = "prefill-0", process.address
        attempt = await router.begin(start)
        await eventually(lambda: decode.worker.num_waiting == 1)
        await asyncio.sleep(0.1)
        await process.end(signal.SIGKILL)
        async with stopwatch() as watch:
            answer = await attempt.finish()
        assert watch.seconds < 2.0
        assert isinstance(answer.error, WorkerLost)
        assert answer.error.metadata["worker_id"] == "prefill-0"
        await settled(decode)

        start.task.id.attempt = 2
        async with stopwatch() as watch:
            gone = await router.ask(start)
        assert watch.seconds < 2.0
        assert isinstance(gone.error, WorkerLost)
        await settled(decode)

        await process.start()
        await process.wait_serving()
        start.task.id.attempt = 3
        assert (await router.ask(start)).error is None
        await settled(decode)
    assert await process.end() == 0


async def test_both_roles_in_one_process_from_either_entry_point(
    model_dir: Path,
    tls_files: Tls,
    dev_certs: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    path = config_file(tmp_path, "prefill", model_dir, dev_certs, port=port)
    path.write_text(
        path.read_text().replace("prefill.pem", "worker.pem").replace("prefill.key", "worker.key")
    )
    process = WorkerProcess("prefill", path, port, "--role", "both")
    await process.start()
    await process.wait_serving()
    channel = internal_channel(process.address, role="decode", tls=tls_files("router"))
    router = RouterSide(channel)
    answer = await router.ask(make_start(prompt_of(100)))
    assert answer.error is None
    assert len(answer.tokens) == 8
    await channel.close()
    assert await process.end() == 0


async def test_what_keeps_a_worker_from_starting_is_one_clear_line(
    model_dir: Path,
    tls_files: Tls,
    dev_certs: Path,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    empty, good = tmp_path / "empty", tmp_path / "good"
    for directory in (empty, good):
        directory.mkdir()
    (empty / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    unknown_key = config_file(
        tmp_path, "decode", model_dir, dev_certs, port=free_port(), extra="max_atempts = 3"
    )
    async with worker_at(Role.PREFILL, model_dir, tls_files) as running:
        port = running.server.port
        no_weights = config_file(empty, "decode", empty, dev_certs, port=port)
        port_taken = config_file(good, "decode", model_dir, dev_certs, port=port)
        said = await asyncio.gather(
            *(
                last_words(WorkerProcess("decode", path, port))
                for path in (unknown_key, no_weights, port_taken)
            )
        )
    assert [(status, words.count("\n")) for status, words in said] == [(2, 0)] * 3
    config_error, checkpoint_error, port_error = (words for _, words in said)
    assert "decode.max_atempts" in config_error
    assert unknown_key.name in config_error
    assert "safetensors" in checkpoint_error
    assert f"cannot listen on 127.0.0.1:{port}" in port_error


async def last_words(process: WorkerProcess) -> tuple[int | None, str]:
    """Exit status and the lines of stderr that are neither our log nor gRPC's."""
    await process.start()
    assert process.process is not None
    _, said = await process.process.communicate()
    lines = [line for line in said.decode().splitlines() if line.startswith("tidemill ")]
    assert "Traceback" not in said.decode()
    return process.process.returncode, "\n".join(lines)
