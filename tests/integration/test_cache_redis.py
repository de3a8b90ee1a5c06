"""The cache and its Redis: a shared index, statistics, and life without it."""

import asyncio
import logging
import random
import time
from collections.abc import Callable

import pytest
import redis.asyncio

from services.cache.index import BlockIndex, Holding, Node
from services.cache.node import CacheNode
from services.cache.redis_link import RedisLink
from services.cache.stats import StatsBook
from tests.cache_node import ALICE, BOB, Tls, cache_client, cache_node, chain, fetch_all, hashes
from tests.redis_process import RedisProcess
from tidemill.errors import ConfigError

pytestmark = pytest.mark.redis

BLOCKS = chain(*(bytes([n]) * 1000 for n in range(8)))

StartRedis = Callable[..., RedisProcess]


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        await asyncio.sleep(0.02)


async def keys_of(server: RedisProcess, pattern: str = "tm:b:*") -> set[bytes]:
    async with redis.asyncio.Redis.from_url(server.url) as client:
        return {key async for key in client.scan_iter(pattern, count=1000)}


async def indexed(server: RedisProcess, number: int, timeout_s: float = 30.0) -> set[bytes]:
    """The index's keys once there are `number`."""
    deadline = time.monotonic() + timeout_s
    while len(keys := await keys_of(server)) != number:
        assert time.monotonic() < deadline, f"{len(keys)} entries, not {number}"
        await asyncio.sleep(0.02)
    return keys


async def acquainted(*nodes: CacheNode) -> None:
    """Until every node knows every other one."""
    for node in nodes:
        assert node.index is not None
        index = node.index
        await eventually(lambda index=index: len(index.peers) == len(nodes) - 1)  # type: ignore[misc]  # bound at once


async def test_what_is_stored_is_indexed_and_what_is_evicted_is_not(
    tls_files: Tls, redis_server: StartRedis
) -> None:
    server = redis_server()
    async with (
        cache_node(tls_files, redis_url=server.url, capacity_bytes=8000) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await client.store(ALICE, BLOCKS)
        assert await indexed(server, 8) == {b"tm:b:" + each for each in hashes(BLOCKS)}
        async with redis.asyncio.Redis.from_url(server.url) as raw:
            value = await raw.get(b"tm:b:" + BLOCKS[0][0])
            assert isinstance(value, bytes)
            assert ALICE.cache_scope not in value
            assert 0 < await raw.ttl(b"tm:b:" + BLOCKS[0][0]) <= 3600
        ((new_hash, new_payload),) = chain(bytes(8000))
        await client.store(ALICE, [(new_hash, new_payload)])
        assert node.store.num_evicted == 8
        assert await indexed(server, 1) == {b"tm:b:" + new_hash}


async def test_blocks_at_another_node_are_found_and_fetched_there(
    tls_files: Tls, redis_server: StartRedis
) -> None:
    server = redis_server()
    async with (
        cache_node(tls_files, redis_url=server.url) as near,
        cache_node(tls_files, redis_url=server.url) as far,
        cache_client(tls_files, near.address) as client,
        cache_client(tls_files, far.address) as far_client,
    ):
        await acquainted(near, far)
        await client.store(ALICE, BLOCKS[:2])
        await far_client.store(ALICE, BLOCKS[2:6])
        await client.store(ALICE, BLOCKS[6:7])
        await indexed(server, 7)
        held = await client.lookup(ALICE, hashes(BLOCKS))
        assert [(address, len(run)) for address, run in held.holders] == [
            ("", 2),
            (far.address, 4),
            ("", 1),
        ]
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [block.payload for block in found] == [payload for _, payload in BLOCKS[:7]]
        assert len(await client.lookup(BOB, hashes(BLOCKS[2:]))) == 0


async def test_entries_of_a_nodes_earlier_life_are_ignored(
    tls_files: Tls, redis_server: StartRedis
) -> None:
    server = redis_server()
    async with (
        cache_node(tls_files, redis_url=server.url, node_id="a") as near,
        cache_client(tls_files, near.address) as client,
    ):
        async with (
            cache_node(tls_files, redis_url=server.url, node_id="b") as far,
            cache_client(tls_files, far.address) as far_client,
        ):
            await far_client.store(ALICE, BLOCKS)
            await indexed(server, 8)
            await acquainted(near, far)
            assert len(await client.lookup(ALICE, hashes(BLOCKS))) == 8
        async with cache_node(tls_files, redis_url=server.url, node_id="b") as reborn:
            assert near.index is not None
            index = near.index
            await eventually(lambda: list(index.peers.values()) == [reborn.address])
            assert len(await keys_of(server)) == 8
            assert len(await client.lookup(ALICE, hashes(BLOCKS))) == 0


async def test_serving_goes_on_without_redis_and_the_index_is_refilled_after(
    tls_files: Tls, redis_server: StartRedis, caplog: pytest.LogCaptureFixture
) -> None:
    server = redis_server()
    async with (
        cache_node(tls_files, redis_url=server.url) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await client.store(ALICE, BLOCKS[:4])
        await indexed(server, 4)
        server.kill()
        await eventually(lambda: not node.redis_up)
        await client.store(ALICE, BLOCKS[4:])
        assert len(await fetch_all(client, ALICE, hashes(BLOCKS))) == 8
        assert node.registry.get_sample_value("tidemill_cache_redis_up") == 0
        assert (await client.stats()).stats[0].stored_blocks == 8
        await asyncio.sleep(1.5)
        away = [record for record in caplog.records if "redis is away" in record.message]
        assert len(away) == 1

        server.start()
        await indexed(server, 8)
        assert node.redis_up
        await eventually(lambda: not node.stats.unsent)
        stats = (await client.stats()).stats[0]
        # What had been counted in the lost Redis is gone with it; the rest was kept here.
        assert stats.delivered_blocks == 8
        assert stats.stored_blocks in (4, 8)


async def test_everything_is_announced_again_after_the_index_was_flushed(
    tls_files: Tls, redis_server: StartRedis
) -> None:
    server = redis_server()
    async with (
        cache_node(tls_files, redis_url=server.url) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await client.store(ALICE, BLOCKS)
        await indexed(server, 8)
        async with redis.asyncio.Redis.from_url(server.url) as raw:
            await raw.flushall()
        await indexed(server, 8)


async def test_a_wrong_password_stops_the_start_and_is_not_repeated(
    tls_files: Tls, redis_server: StartRedis
) -> None:
    server = redis_server()
    url = f"redis://tidemill:not-the-password@127.0.0.1:{server.port}/0"
    with pytest.raises(ConfigError, match=f"127.0.0.1:{server.port}") as caught:
        async with cache_node(tls_files, redis_url=url):
            pass
    assert "not-the-password" not in str(caught.value)


async def test_redis_may_come_after_the_service(tls_files: Tls, redis_server: StartRedis) -> None:
    server = redis_server()
    server.stop()
    async with (
        cache_node(tls_files, redis_url=server.url) as node,
        cache_client(tls_files, node.address) as client,
    ):
        assert not node.redis_up
        await client.store(ALICE, BLOCKS)
        server.start()
        await indexed(server, 8)


async def test_a_redis_that_never_evicts_is_warned_about(
    tls_files: Tls, redis_server: StartRedis, caplog: pytest.LogCaptureFixture
) -> None:
    for policy, warnings in (("noeviction", 1), ("allkeys-lru", 0)):
        caplog.clear()
        server = redis_server(maxmemory_policy=policy)
        async with cache_node(tls_files, redis_url=server.url):
            found = [each for each in caplog.records if each.levelno >= logging.WARNING]
            assert len(found) == warnings


async def test_a_frozen_redis_costs_little_and_only_once(
    tls_files: Tls, redis_server: StartRedis
) -> None:
    server = redis_server()
    wait_s = 1.0
    async with (
        cache_node(tls_files, redis_url=server.url, redis_timeout_s=wait_s) as near,
        cache_node(tls_files, redis_url=server.url) as far,
        cache_client(tls_files, near.address) as client,
    ):
        await acquainted(near, far)
        await client.store(ALICE, BLOCKS)
        with server.frozen():
            assert len(await client.lookup(ALICE, hashes(BLOCKS))) == 8
            await client.lookup(ALICE, [*hashes(BLOCKS), b"h" * 32])
            await eventually(lambda: not near.redis_up)
            begun = time.monotonic()
            for _ in range(20):
                assert len(await client.lookup(ALICE, [*hashes(BLOCKS), b"h" * 32])) == 8
            assert time.monotonic() - begun < 10 * wait_s


async def test_statistics_are_summed_over_nodes(tls_files: Tls, redis_server: StartRedis) -> None:
    server = redis_server()
    async with (
        cache_node(tls_files, redis_url=server.url) as one,
        cache_node(tls_files, redis_url=server.url) as two,
        cache_client(tls_files, one.address) as client_one,
        cache_client(tls_files, two.address) as client_two,
    ):
        await client_one.store(ALICE, BLOCKS[:3])
        await client_two.store(ALICE, BLOCKS[3:])
        await eventually(lambda: not two.stats.unsent)
        assert (await client_one.stats()).stats[0].stored_blocks == 8


async def test_a_batch_sent_twice_counts_once(redis_server: StartRedis) -> None:
    server = redis_server()
    link = RedisLink(server.url, 5.0)
    await link.start()
    book = StatsBook(link, "node 1")
    book.count(("alice", "tiny"), "found", 3)
    batch = book._next_batch()
    for _ in range(2):
        assert await link.run(lambda client: book._add(client, batch))
    assert await book.rows() == {("alice", "tiny"): {"found": 3}}
    await link.close()


async def test_cancelled_lookups_never_get_each_others_answers(
    redis_server: StartRedis,
) -> None:
    server = redis_server()
    link = RedisLink(server.url, 5.0)
    await link.start()
    holder = BlockIndex(link, Node("holder", 1), list, entry_ttl_s=60)
    holder.address = "127.0.0.1:1"
    for number in range(100):
        holder.stored(Holding(number.to_bytes(32, "big"), b"n" * 32, number + 1, tier=1))
    await holder.flush()
    seeker = BlockIndex(link, Node("seeker", 1), list, entry_ttl_s=60)
    await seeker.flush()
    chance = random.Random(7)

    async def look(number: int) -> int | None:
        (found,) = await seeker.find(b"n" * 32, [number.to_bytes(32, "big")])
        return None if found is None else found.num_bytes - 1

    async def look_or_leave(number: int) -> None:
        try:
            async with asyncio.timeout(chance.random() * 0.003):
                assert await look(number) == number
        except TimeoutError:
            pass

    for _ in range(20):
        await asyncio.gather(*(look_or_leave(chance.randrange(100)) for _ in range(20)))
        number = chance.randrange(100)
        assert await look(number) == number
    await link.close()
