"""The cache's disk tier behind the service: promotion, restarts, other nodes, and broken disks."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from services.cache.node import CacheNode
from tests.cache_node import ALICE, BOB, Tls, cache_client, cache_node, chain, fetch_all, hashes
from tests.redis_process import RedisProcess
from tests.tiny_model import make_tiny_checkpoint
from tests.worker_harness import eventually, make_start, prompt_of, router_of, worker_at
from tidemill.errors import ConfigError
from tidemill.kv.cache_client import CacheClient, CacheClientConfig, CacheTier
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.probe import probe
from tidemill.worker.config import CacheConfig, Role

BLOCKS = chain(*(os.urandom(50_000) for _ in range(8)))
RAM, DISK = CacheTier.RAM, CacheTier.DISK
PATIENT = CacheClientConfig(lookup_s=10, stall_s=10)


def with_disk(root: Path, **settings: Any) -> dict[str, Any]:
    """A memory of two blocks over a disk of a hundred megabytes."""
    defaults = {
        "capacity_bytes": 100_000,
        "disk_path": root,
        "disk_capacity_bytes": 100 << 20,
        "disk_timeout_s": 20.0,
    }
    return defaults | settings


def sample(node: CacheNode, name: str, **labels: str) -> float:
    return node.registry.get_sample_value(f"tidemill_cache_{name}", labels) or 0.0


async def written(node: CacheNode, num_blocks: int) -> None:
    disk = node.disk
    assert disk is not None
    await eventually(lambda: disk.scanned and len(disk) >= num_blocks and not disk.num_waiting)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)


async def store_one_by_one(client: CacheClient, blocks: list[tuple[bytes, bytes]]) -> None:
    """A stream never lets its own earlier blocks go, so each block is a stream."""
    for each in blocks:
        assert (await client.store(ALICE, [each])).stored == 1


def file_of(root: Path, block_hash: bytes) -> Path:
    return root / "v1" / block_hash.hex()[:2] / block_hash.hex()


async def test_what_memory_lets_go_is_delivered_from_disk_and_comes_back_to_memory(
    tls_files: Tls, tmp_path: Path
) -> None:
    async with (
        cache_node(tls_files, **with_disk(tmp_path)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS)
        await written(node, 6)
        held = await client.lookup(ALICE, hashes(BLOCKS))
        assert held.tiers == (DISK,) * 6 + (RAM,) * 2
        found = await fetch_all(client, ALICE, hashes(BLOCKS)[:2])
        assert [(each.payload, each.tier) for each in found] == [
            (payload, DISK) for _, payload in BLOCKS[:2]
        ]
        await written(node, 8)
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [each.payload for each in found] == [payload for _, payload in BLOCKS]
        assert [each.tier for each in found] == [RAM] * 2 + [DISK] * 6
        assert sample(node, "promoted_total") >= 2
        assert len(await client.lookup(BOB, hashes(BLOCKS))) == 0
        assert await fetch_all(client, BOB, hashes(BLOCKS)) == []
        assert (await client.store(ALICE, BLOCKS)).skipped == 8
        stats = await client.stats()
        assert (stats.disk_blocks, stats.disk_bytes) == (8, 400_000)
        assert stats.disk_capacity_bytes == 100 << 20
        assert sample(node, "disk_bytes") == 400_000


async def test_a_disk_with_no_room_left_lets_the_oldest_go(tls_files: Tls, tmp_path: Path) -> None:
    settings = {**with_disk(tmp_path), "disk_capacity_bytes": 300_000}
    async with (
        cache_node(tls_files, **settings) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS)
        disk = node.disk
        assert disk is not None
        await eventually(lambda: not disk.num_waiting)
        assert sample(node, "disk_evicted") >= 1
        assert sample(node, "disk_bytes") <= 300_000


async def test_a_restart_keeps_all_that_memory_and_disk_held(
    tls_files: Tls, tmp_path: Path
) -> None:
    async with (
        cache_node(tls_files, **with_disk(tmp_path)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS)
    async with (
        cache_node(tls_files, **with_disk(tmp_path)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await written(node, 8)
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [(each.payload, each.tier) for each in found] == [
            (payload, DISK) for _, payload in BLOCKS
        ]


async def test_a_node_serves_while_it_still_learns_what_lies_on_disk(
    tls_files: Tls, tmp_path: Path
) -> None:
    async with (
        cache_node(tls_files, **with_disk(tmp_path)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS)
    async with AsyncExitStack() as stack:
        gate = asyncio.Event()
        node = await stack.enter_async_context(cache_node(tls_files, **with_disk(tmp_path)))
        assert node.disk is not None
        blocking = node.disk._writer.submit(lambda: asyncio.run(_wait(gate)))
        client = await stack.enter_async_context(cache_client(tls_files, node.address))
        fresh = chain(b"fresh")
        assert (await client.store(ALICE, fresh)).stored == 1
        assert len(await fetch_all(client, ALICE, hashes(fresh))) == 1
        gate.set()
        await asyncio.wrap_future(blocking)
        await written(node, 8)


async def _wait(gate: asyncio.Event) -> None:
    while not gate.is_set():  # noqa: ASYNC110 - set from another loop
        await asyncio.sleep(0.01)


def truncate(root: Path, block_hash: bytes) -> None:
    os.truncate(file_of(root, block_hash), 20_000)


def flip(root: Path, block_hash: bytes) -> None:
    path = file_of(root, block_hash)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def swap(root: Path, block_hash: bytes) -> None:
    path, other = file_of(root, block_hash), file_of(root, BLOCKS[0][0])
    shutil.copyfile(other, path)


def remove(root: Path, block_hash: bytes) -> None:
    file_of(root, block_hash).unlink()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [(truncate, "truncated"), (flip, "corrupt"), (swap, "swapped"), (remove, "missing")],
)
async def test_a_spoilt_file_ends_the_fetch_is_counted_and_stored_again(
    tls_files: Tls, tmp_path: Path, damage: Callable[[Path, bytes], None], cause: str
) -> None:
    async with (
        cache_node(tls_files, **with_disk(tmp_path)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS)
        await written(node, 6)
        damage(tmp_path, BLOCKS[2][0])
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [each.payload for each in found] == [payload for _, payload in BLOCKS[:2]]
        assert sample(node, "disk_faults_total", cause=cause) == 1
        assert sample(node, "failed_total", cause=cause) == 1
        assert (await client.stats()).stats[0].failed_blocks == 1
        assert len(await client.lookup(ALICE, hashes(BLOCKS))) == 2
        await store_one_by_one(client, BLOCKS[2:3])
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [each.payload for each in found] == [payload for _, payload in BLOCKS]


async def test_a_removed_folder_costs_its_blocks_and_nothing_else(
    tls_files: Tls, tmp_path: Path
) -> None:
    root = tmp_path / "disk"
    async with (
        cache_node(tls_files, **with_disk(root)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS)
        await written(node, 6)
        shutil.rmtree(root)
        assert await fetch_all(client, ALICE, hashes(BLOCKS)) == []
        assert sample(node, "disk_up") == 0
        assert sample(node, "disk_blocks") == 0
        assert sample(node, "disk_faults_total", cause="folder") == 1
        channel = internal_channel(node.address, role="cache", tls=tls_files("router"))
        async with channel:
            node.server.set_readiness_now()
            assert await probe(channel) == "SERVING"
        assert len(await fetch_all(client, ALICE, hashes(BLOCKS[6:]))) == 2

        async def again() -> bool:
            await client.store(ALICE, chain(os.urandom(50_000)))
            return sample(node, "disk_blocks") > 0

        await until(again)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tidemill-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)  # noqa: S607 - whatever is on PATH


async def test_a_full_disk_drops_blocks_gives_way_and_keeps_serving(
    tls_files: Tls, small_disk: Path
) -> None:
    root = small_disk / "cache"
    async with (
        cache_node(tls_files, **with_disk(root, capacity_bytes=60_000)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        (small_disk / "another's").write_bytes(bytes(800_000))
        blocks = chain(*(os.urandom(50_000) for _ in range(12)))
        await store_one_by_one(client, blocks)
        disk = node.disk
        assert disk is not None
        await eventually(lambda: not disk.num_waiting)
        assert sample(node, "disk_faults_total", cause="full") >= 1
        assert sample(node, "disk_up") == 0
        assert list((root / "partial").iterdir()) == []
        on_disk = [each.block_hash for each in disk.headers()]
        assert on_disk
        for each in on_disk:  # what was written before is still good
            assert len(await fetch_all(client, ALICE, [each])) == 1
        (small_disk / "another's").unlink()

        async def written_again() -> bool:
            await client.store(ALICE, chain(os.urandom(50_000)))
            return sample(node, "disk_up") == 1

        await until(written_again)


async def test_a_disk_that_became_read_only_is_still_read(tls_files: Tls, small_disk: Path) -> None:
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    root = small_disk / "cache"
    async with (
        cache_node(tls_files, **with_disk(root, capacity_bytes=60_000)) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await store_one_by_one(client, BLOCKS[:3])
        await written(node, 2)
        subprocess.run(remount, check=True)  # noqa: ASYNC221 - it returns at once
        found = await fetch_all(client, ALICE, hashes(BLOCKS[:2]))
        assert [each.tier for each in found] == [DISK, DISK]
        await eventually(lambda: sample(node, "disk_faults_total", cause="denied") >= 1)
        assert sample(node, "disk_up") == 0


async def test_a_disk_in_use_is_refused_at_start(tls_files: Tls, tmp_path: Path) -> None:
    async with cache_node(tls_files, **with_disk(tmp_path)):
        with pytest.raises(ConfigError, match="another process uses this folder"):
            async with cache_node(tls_files, **with_disk(tmp_path)):
                pass


@pytest.mark.redis
async def test_other_nodes_find_blocks_on_this_ones_disk_also_after_a_restart(
    tls_files: Tls, tmp_path: Path, redis_server: Callable[..., RedisProcess]
) -> None:
    url = redis_server().url
    settings = with_disk(tmp_path, redis_url=url, node_id="far")
    async with cache_node(tls_files, redis_url=url) as near, AsyncExitStack() as stack:
        client = await stack.enter_async_context(cache_client(tls_files, near.address))

        async def found(expected: list[CacheTier]) -> bool:
            held = await client.lookup(ALICE, hashes(BLOCKS))
            return list(held.tiers) == expected

        async with (
            cache_node(tls_files, **settings) as far,
            cache_client(tls_files, far.address) as far_client,
        ):
            await store_one_by_one(far_client, BLOCKS)
            await until(lambda: found([DISK] * 6 + [RAM] * 2))
            blocks = await fetch_all(client, ALICE, hashes(BLOCKS))
            assert [each.payload for each in blocks] == [payload for _, payload in BLOCKS]
        async with cache_node(tls_files, **settings):
            await until(lambda: found([DISK] * 8))


async def test_a_prompt_found_on_disk_is_billed_as_such(tls_files: Tls, tmp_path: Path) -> None:
    model_dir = make_tiny_checkpoint(tmp_path / "model")
    async with AsyncExitStack() as stack:
        settings = with_disk(tmp_path / "disk", capacity_bytes=1)  # nothing fits
        cache = await stack.enter_async_context(cache_node(tls_files, **settings))
        shared = CacheConfig(cache.address, client=PATIENT)
        answers = []
        for name in ("one", "other"):
            worker = await stack.enter_async_context(
                worker_at(Role.BOTH, model_dir, tls_files, worker_id=name, cache=shared)
            )
            router = await stack.enter_async_context(router_of(worker, tls_files))
            answers.append(await router.ask(make_start(prompt_of(200), name)))
            await written(cache, 3)
        assert answers[1].tokens == answers[0].tokens
        assert answers[1].usage.reused_cache_disk_tokens == 192
        assert answers[1].usage.computed_tokens == 8
