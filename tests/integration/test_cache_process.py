"""`python -m services.cache` as a process: start, refusal to start, crash, restart."""

import asyncio
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from tests.cache_node import ALICE, Tls, cache_client, chain, hashes
from tests.stopwatch import stopwatch
from tidemill.errors import CacheUnavailable
from tidemill.kv.cache_client import CacheClientConfig, CacheTier

ROOT = Path(__file__).resolve().parents[2]

StartCache = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start_cache(tls_files: Tls, tmp_path: Path) -> Iterator[StartCache]:
    """(port, **settings) -> the running process, its log in tmp_path/log."""
    processes = []

    def start(port: int, **settings: str) -> "subprocess.Popen[bytes]":
        tls = tls_files("cache")
        config = tmp_path / "tidemill.toml"
        lines = [f"{key} = {value}" for key, value in settings.items()]
        config.write_text(
            "[cache]\n"
            + "\n".join(lines)
            + f'\n[cache.server]\naddress = "127.0.0.1:{port}"\ndrain_s = 1.0\n'
            + f'[cache.server.tls]\ncert = "{tls.cert}"\nkey = "{tls.key}"\nca = "{tls.ca}"\n'
        )
        command = [sys.executable, "-m", "services.cache", "--config", str(config)]
        environ = {key: value for key, value in os.environ.items() if "TIDEMILL" not in key}
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environ, stderr=log, stdout=log)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


async def until_ready(tls: Tls, address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        async with cache_client(tls, address) as client:
            try:
                await client.stats()
            except CacheUnavailable:
                await asyncio.sleep(0.1)
            else:
                return
    raise AssertionError("the cache did not come up")


async def test_a_cache_killed_in_the_middle_of_a_fetch_is_an_error_within_two_seconds(
    tls_files: Tls, start_cache: StartCache, free_port: Callable[[], int]
) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    process = start_cache(port)
    await until_ready(tls_files, address)
    blocks = chain(*(bytes([n]) * (4 << 20) for n in range(16)))
    config = CacheClientConfig(lookup_s=5, stall_s=2, pause_s=0.2, most_pause_s=0.5)
    async with cache_client(tls_files, address, config=config) as client:
        assert (await client.store(ALICE, blocks)).stored == 16
        num_blocks = 0
        seconds_at_kill = 0.0
        with pytest.raises(CacheUnavailable):  # noqa: PT012 - it happens between two blocks
            async with (
                stopwatch() as watch,
                aclosing(client.fetch(ALICE, hashes(blocks))) as found,
            ):
                async for block in found:
                    assert block.payload == blocks[block.index][1]
                    num_blocks += 1
                    if num_blocks == 2:
                        process.kill()
                        process.wait()
                        seconds_at_kill = watch.seconds
        assert watch.seconds - seconds_at_kill < 2
        assert 2 <= num_blocks < 16
        with pytest.raises(CacheUnavailable, match="skipped"):
            await client.lookup(ALICE, hashes(blocks))

        start_cache(port)
        await until_ready(tls_files, address)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not client.available:
            try:
                assert len(await client.lookup(ALICE, hashes(blocks))) == 0
            except CacheUnavailable:
                await asyncio.sleep(0.05)
        assert client.available, "the client does not come back"


async def test_blocks_on_disk_outlive_kill_9_and_nothing_half_written_is_delivered(
    tls_files: Tls, start_cache: StartCache, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    disk = tmp_path / "disk"
    settings = {"capacity_bytes": "1000000", "disk_path": f'"{disk}"', "disk_timeout_s": "20.0"}
    settings["disk_capacity_bytes"] = "1000000000"
    process = start_cache(port, **settings)
    await until_ready(tls_files, address)
    blocks = chain(*(os.urandom(500_000) for _ in range(40)))
    async with cache_client(tls_files, address) as client:
        storing = asyncio.create_task(client.store(ALICE, blocks))
        deadline = time.monotonic() + 60
        while len(list(disk.glob("v1/*/*"))) < 10:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        process.kill()
        process.wait()
        await asyncio.gather(storing, return_exceptions=True)

    start_cache(port, **settings)
    await until_ready(tls_files, address)
    on_disk = {path.name for path in disk.glob("v1/*/*")}
    kept = [each for each in blocks if each[0].hex() in on_disk]
    assert len(kept) >= 10
    assert list((disk / "partial").iterdir()) == []
    async with cache_client(tls_files, address) as client:
        deadline = time.monotonic() + 60
        while len(held := await client.lookup(ALICE, hashes(kept))) < len(kept):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        found = [block async for block in client.fetch_held(held)]
        assert [block.payload for block in found] == [payload for _, payload in kept]


def thread_heaps(process: "subprocess.Popen[bytes]") -> list[str]:
    """Mappings that are glibc's heaps of single threads: 64 MiB reserved at a multiple of that."""
    size = 64 << 20
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    spans = [[int(each, 16) for each in line.split()[0].split("-")] for line in lines]
    return [
        line
        for line, (start, end), (next_start, next_end) in zip(lines, spans, spans[1:], strict=False)
        if start % size == 0 and end == next_start and next_end == start + size
    ]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others keep no heaps by thread")
async def test_blocks_read_from_disk_lie_on_no_heap_of_the_thread_that_read_them(
    tls_files: Tls, start_cache: StartCache, free_port: Callable[[], int], tmp_path: Path
) -> None:
    port = free_port()
    disk = {"disk_path": f'"{tmp_path / "disk"}"', "disk_capacity_bytes": "100000000"}
    process = start_cache(port, capacity_bytes="1000000", disk_timeout_s="20.0", **disk)
    await until_ready(tls_files, f"127.0.0.1:{port}")
    blocks = chain(*(os.urandom(100_000) for _ in range(40)))
    async with cache_client(tls_files, f"127.0.0.1:{port}") as client:
        await client.store(ALICE, blocks)
        deadline = time.monotonic() + 60
        while (await client.stats()).disk_blocks < 20:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        found = [block async for block in client.fetch(ALICE, hashes(blocks))]
    assert CacheTier.DISK in {block.tier for block in found}
    assert thread_heaps(process) == []


async def test_it_drains_and_ends_well_when_told_to(
    tls_files: Tls, start_cache: StartCache, free_port: Callable[[], int]
) -> None:
    port = free_port()
    process = start_cache(port)
    await until_ready(tls_files, f"127.0.0.1:{port}")
    process.terminate()
    assert process.wait(10) == 0


def test_a_config_error_is_one_line_and_exit_status_2(
    start_cache: StartCache, free_port: Callable[[], int], tmp_path: Path
) -> None:
    process = start_cache(free_port(), capacity="5")
    assert process.wait(30) == 2
    log = (tmp_path / "log").read_text()
    assert "capacity: unknown key" in log
    assert "tidemill.toml" in log
    assert "Traceback" not in log


def test_a_port_in_use_is_named(
    start_cache: StartCache, free_port: Callable[[], int], tmp_path: Path, tls_files: Tls
) -> None:
    port = free_port()
    start_cache(port)
    asyncio.run(until_ready(tls_files, f"127.0.0.1:{port}"))
    assert start_cache(port).wait(30) == 2
    assert f"127.0.0.1:{port}" in (tmp_path / "log").read_text()
