"""Hand-overs through shared memory: the same bytes, the same rules, and gRPC where it cannot be."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from tests.integration.test_handover import chain_of, prefill_request, stub_of, touched
from tests.worker_harness import (
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
from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.errors import InvalidRequest, WorkerLost
from tidemill.kv import shm
from tidemill.kv.transport import GrpcKvTransport
from tidemill.rpc.status import from_rpc_error
from tidemill.worker import process
from tidemill.worker.config import HandoverConfig, Role
from tidemill.worker.process import RunningWorker


@asynccontextmanager
async def pair(
    model_dir: Path, tls: Tls, source_dir: Path | None, sink_dir: Path | None, **decode: Any
) -> AsyncIterator[tuple[RunningWorker, RunningWorker]]:
    """A prefill and a decode worker, each with its own idea of shared memory."""
    async with (
        worker_at(
            Role.PREFILL, model_dir, tls, handover=HandoverConfig(shm_dir=source_dir)
        ) as source,
        worker_at(
            Role.DECODE, model_dir, tls, handover=HandoverConfig(shm_dir=sink_dir), **decode
        ) as sink,
    ):
        yield source, sink


def files_in(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir() if each.name != "id"]


async def ask(prefill: RunningWorker, decode: RunningWorker, tls: Tls, *, seed: int = 1) -> Any:
    async with router_of(decode, tls) as router:
        prompt = prompt_of(256, seed=seed)
        return await router.ask(make_start(prompt, f"r{seed}", prefill=prefill))


async def test_latents_land_bitwise_and_none_pass_through_messages(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    folder = tmp_path / "shm"
    carried = 0

    async def weigh(_pull: int, segments: Sequence[KvSegment]) -> None:
        nonlocal carried
        carried += sum(len(segment.data) for segment in segments)

    watched = touched(weigh, [])
    async with pair(model_dir, tls_files, folder, folder, make_transport=watched) as (
        prefill,
        decode,
    ):
        answer = await ask(prefill, decode, tls_files)
        assert answer.error is None
        pools = [running.worker.engine.pool for running in (prefill, decode)]
        hashes = chain_of(prefill, 256)
        computed, landed = ([pool.read_block(b) for b in pool.claim(hashes)] for pool in pools)
        assert len(computed) == len(landed) == 4
        assert all(torch.equal(a, b) for a, b in zip(computed, landed, strict=True))
        assert carried == 0
        assert metric(decode, "pulls_total", transport="shm") == 1
        assert metric(decode, "handover_bytes_total", direction="received") > 0
        assert len(files_in(folder)) == 1
        again = await ask(prefill, decode, tls_files, seed=2)
        assert again.error is None
        assert len(files_in(folder)) == 1, "the file of the first pull serves the second"
        transports = prefill.worker.describe().kv_transports
        assert list(transports) == ["grpc", "shm"]
    assert files_in(folder) == []


async def test_answers_are_the_same_through_either_transport(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    async with pair(model_dir, tls_files, tmp_path, tmp_path) as (prefill, decode):
        shared = await ask(prefill, decode, tls_files)
        await settled(prefill, decode)
    async with pair(model_dir, tls_files, None, None) as (prefill, decode):
        plain = await ask(prefill, decode, tls_files)
        assert list(prefill.worker.describe().kv_transports) == ["grpc"]
        assert metric(decode, "pulls_total", transport="grpc") == 1
    assert shared.tokens == plain.tokens


async def test_workers_of_different_folders_use_messages(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    async with pair(model_dir, tls_files, one, other) as (prefill, decode):
        assert (await ask(prefill, decode, tls_files)).error is None
        assert metric(decode, "pulls_total", transport="grpc") == 1
        assert metric(decode, "shm_fallbacks_total", cause="other_folder") == 1
        await settled(prefill, decode)


async def test_a_source_that_cannot_open_the_file_sends_messages(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(mode=0o700)
    (one / "id").write_bytes(b"i" * 16)
    shutil.copytree(one, other)  # the same id, and yet not the same folder
    async with pair(model_dir, tls_files, one, other) as (prefill, decode):
        assert (await ask(prefill, decode, tls_files)).error is None
        assert metric(decode, "pulls_total", transport="grpc") == 1
        assert metric(decode, "shm_fallbacks_total", cause="refused") == 1
        assert metric(decode, "pull_retries_total") == 0
        assert files_in(other) == []
        await settled(prefill, decode)


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte, in which no arena has room."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tidemill-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)  # noqa: S607 - whatever is on PATH


async def test_full_shared_memory_means_messages(
    model_dir: Path, tls_files: Tls, small_memory: Path
) -> None:
    async with pair(model_dir, tls_files, small_memory, small_memory) as (prefill, decode):
        assert (await ask(prefill, decode, tls_files)).error is None
        assert metric(decode, "pulls_total", transport="grpc") == 1
        assert metric(decode, "shm_fallbacks_total", cause="no_room") == 1
        assert files_in(small_memory) == []


async def test_a_spoilt_segment_is_pulled_again_into_another_file(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    names: list[list[str]] = []

    async def spoil_first(pull: int, segments: Sequence[KvSegment]) -> None:
        names.append(files_in(tmp_path))
        if pull == 1:
            segments[0].xxh3 ^= 1

    spoilt = touched(spoil_first, [])
    async with pair(model_dir, tls_files, tmp_path, tmp_path, make_transport=spoilt) as (
        prefill,
        decode,
    ):
        answer = await ask(prefill, decode, tls_files)
        assert answer.error is None
        assert metric(decode, "pull_retries_total") == 1
        assert metric(decode, "pulls_total", transport="shm") == 1
        assert names[0] != names[-1]
        await settled(prefill, decode)


class Broken:
    """A pull whose connection is cut in the middle."""

    def __init__(self, inner: GrpcKvTransport) -> None:
        self._inner = inner

    async def pull(
        self, handover: pb.HandoverRef, *, timeout_s: float, shm: pb.ShmTarget | None = None
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        async for segments in self._inner.pull(handover, timeout_s=timeout_s, shm=shm):
            yield segments
            raise grpc.aio.AioRpcError(
                grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "cut"
            )


async def test_a_source_that_dies_leaves_no_file(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    async with pair(
        model_dir,
        tls_files,
        tmp_path,
        tmp_path,
        make_transport=lambda stub: Broken(GrpcKvTransport(stub, max_message_bytes=65_536)),
    ) as (prefill, decode):
        answer = await ask(prefill, decode, tls_files)
        assert isinstance(answer.error, WorkerLost)
        assert files_in(tmp_path) == []
        assert prefill.worker.shared is not None
        windows = prefill.worker.shared.windows
        windows.sweep()
        assert len(windows._open) == 0
        await settled(decode)


async def test_layers_arrive_while_later_chunks_are_computed(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    gate: list[float] = []

    async def note(_pull: int, _segments: Sequence[KvSegment]) -> None:
        gate.append(asyncio.get_running_loop().time())

    async with pair(model_dir, tls_files, tmp_path, tmp_path, make_transport=touched(note, [])) as (
        prefill,
        decode,
    ):
        slow_down(prefill, 0.05)
        async with router_of(decode, tls_files) as router:
            attempt = await router.begin(make_start(prompt_of(640), prefill=prefill))
            await eventually(lambda: bool(gate))
            assert prefill.worker.backlog.num_tokens > 0
            assert (await attempt.finish()).error is None
        assert metric(decode, "pulls_total", transport="shm") == 1


async def test_a_worker_sweeps_what_dead_ones_left(
    model_dir: Path, tls_files: Tls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "YOUNG_S", 0.0)
    monkeypatch.setattr(process, "SHM_SWEEP_S", 0.05)
    tmp_path.chmod(0o700)
    (tmp_path / ("a" * 32)).touch()
    async with pair(model_dir, tls_files, tmp_path, tmp_path) as (prefill, decode):
        assert files_in(tmp_path) == []
        assert (await ask(prefill, decode, tls_files)).error is None
        (live,) = files_in(tmp_path)
        (tmp_path / ("b" * 32)).touch()
        await eventually(lambda: files_in(tmp_path) == [live])


async def test_a_worker_says_which_transports_it_speaks(
    model_dir: Path, tls_files: Tls, tmp_path: Path
) -> None:
    async with pair(model_dir, tls_files, tmp_path, None) as (prefill, decode):
        async with stub_of(prefill, tls_files) as stub:
            request = prefill_request(prefill, 100)
            request.kv_transport = "nixl"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Prefill(request).read()
            assert isinstance(from_rpc_error(caught.value), InvalidRequest)
            request.kv_transport = "shm"
            call = stub.Prefill(request)
            assert len((await call.read()).offer.shm_id) == 16
            call.cancel()
        assert (await ask(prefill, decode, tls_files)).error is None
        assert metric(decode, "pulls_total", transport="grpc") == 1
        await settled(prefill, decode)
