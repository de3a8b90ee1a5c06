"""The cache service and its client over real mutual TLS."""

import os
from collections.abc import Awaitable, Callable

import grpc
import pytest

from services.cache.node import CacheNode
from tests.cache_node import ALICE, BOB, Tls, cache_client, cache_node, chain, fetch_all, hashes
from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.errors import CacheUnavailable, InvalidRequest, PermissionDenied, TidemillError
from tidemill.kv.cache_client import CacheTier, async_stub
from tidemill.kv.pieces import sha256
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.status import from_rpc_error

BLOCKS = chain(b"x", os.urandom(120_000), os.urandom(3 << 20), os.urandom(1 << 20))


def sample(node: CacheNode, name: str, **labels: str) -> float:
    return node.registry.get_sample_value(f"tidemill_cache_{name}", labels) or 0.0


async def error_of(call: Awaitable[object]) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_fetched_blocks_are_bitwise_what_was_stored(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        assert (await client.store(ALICE, BLOCKS)).stored == len(BLOCKS)
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [(block.index, block.payload) for block in found] == [
            (index, payload) for index, (_, payload) in enumerate(BLOCKS)
        ]
        assert {block.tier for block in found} == {CacheTier.RAM}
        assert sample(node, "delivered_total") == len(BLOCKS)


async def test_blocks_held_already_are_skipped(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        await client.store(ALICE, BLOCKS[:2])
        result = await client.store(ALICE, BLOCKS)
        assert (result.stored, result.skipped) == (2, 2)
        assert len(node.store) == 4


async def test_a_fetch_ends_at_the_first_block_that_is_not_held(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        await client.store(ALICE, [BLOCKS[0], BLOCKS[2]])
        assert len(await client.lookup(ALICE, hashes(BLOCKS))) == 1
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [block.payload for block in found] == [BLOCKS[0][1]]
        assert await fetch_all(client, ALICE, hashes(BLOCKS)[1:]) == []


async def test_another_scope_gets_nothing_even_with_the_right_hashes(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        await client.store(ALICE, BLOCKS[:1])
        assert len(await client.lookup(BOB, hashes(BLOCKS))) == 0
        stub = async_stub(internal_channel(node.address, role="cache", tls=tls_files("decode")))
        request = pb.FetchBlocksRequest(
            namespace=pb.BlockNamespace(
                tenant_id="bob",
                cache_scope=BOB.cache_scope,
                layout_fingerprint=BOB.layout_fingerprint,
                model="tiny",
            ),
            block_hashes=hashes(BLOCKS),
        )
        assert [each async for each in stub.FetchBlocks(request)] == []
        # Nor can a second scope take the hash over.
        assert (await client.store(BOB, BLOCKS[:1])).skipped == 1
        assert len(await fetch_all(client, ALICE, hashes(BLOCKS))) == 1


async def test_a_corrupt_block_is_dropped_counted_and_computed_again(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        await client.store(ALICE, BLOCKS)
        bad_hash, payload = BLOCKS[2]
        held = node.store.peek(node.store._blocks[bad_hash].namespace, bad_hash)
        assert held is not None
        object.__setattr__(held, "payload", payload[:-1] + bytes([payload[-1] ^ 1]))
        found = await fetch_all(client, ALICE, hashes(BLOCKS))
        assert [block.index for block in found] == [0, 1]
        assert sample(node, "failed_total", cause="corrupt") == 1
        assert (await client.stats()).stats[0].failed_blocks == 1
        assert (await client.store(ALICE, BLOCKS)).stored == 1
        assert len(await fetch_all(client, ALICE, hashes(BLOCKS))) == len(BLOCKS)


async def test_memory_is_bounded_and_the_end_of_the_oldest_chain_goes_first(
    tls_files: Tls,
) -> None:
    old, new = chain(*(os.urandom(1000) for _ in range(4))), chain(os.urandom(1000))
    async with (
        cache_node(tls_files, capacity_bytes=4500) as node,
        cache_client(tls_files, node.address) as client,
    ):
        await client.store(ALICE, old)
        await client.store(ALICE, new)
        node.store.check_integrity()
        assert len(await client.lookup(ALICE, hashes(old))) == 3
        assert len(await client.lookup(ALICE, hashes(new))) == 1
        assert sample(node, "evictions_total") == 1
        assert (await client.store(ALICE, chain(bytes(5000)))).skipped == 1


async def test_a_chain_longer_than_the_memory_keeps_its_start(tls_files: Tls) -> None:
    blocks = chain(*(os.urandom(1000) for _ in range(6)))
    async with (
        cache_node(tls_files, capacity_bytes=4000) as node,
        cache_client(tls_files, node.address) as client,
    ):
        result = await client.store(ALICE, blocks)
        assert (result.stored, result.skipped) == (4, 2)
        assert len(await client.lookup(ALICE, hashes(blocks))) == 4


async def test_statistics_add_up_by_tenant_and_model(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        await client.store(ALICE, BLOCKS[:2])
        await client.store(BOB, chain(b"bob's"))
        await fetch_all(client, ALICE, hashes(BLOCKS))
        await fetch_all(client, BOB, hashes(BLOCKS))
        answer = await client.stats()
        alice, bob = answer.stats
        assert (alice.tenant_id, alice.model) == ("alice", "tiny")
        assert (alice.stored_blocks, alice.queried_blocks) == (2, 4)
        assert (alice.found_blocks, alice.delivered_blocks, alice.failed_blocks) == (2, 2, 0)
        assert (bob.stored_blocks, bob.queried_blocks, bob.found_blocks) == (1, 4, 0)
        assert (answer.ram_blocks, answer.ram_bytes) == (3, node.store.num_bytes)
        assert answer.ram_capacity_bytes == node.store.capacity_bytes
        assert [row.tenant_id for row in (await client.stats("bob")).stats] == ["bob"]


class Stream:
    """Raw StoreBlocks streams, to send what the client never would."""

    def __init__(self, tls: Tls, address: str) -> None:
        channel = internal_channel(address, role="cache", tls=tls("prefill"))
        self.stub = async_stub(channel)
        self.namespace = pb.BlockNamespace(
            tenant_id="alice", cache_scope=b"a" * 32, layout_fingerprint=b"L" * 32, model="tiny"
        )

    async def refusal(self, *contents: pb.BlockNamespace | BlockPiece) -> InvalidRequest:
        requests = [
            pb.StoreBlocksRequest(namespace=each)
            if isinstance(each, pb.BlockNamespace)
            else pb.StoreBlocksRequest(piece=each)
            for each in contents
        ]
        error = await error_of(self.stub.StoreBlocks(iter(requests)))
        assert isinstance(error, InvalidRequest)
        return error


def piece(data: bytes, *, total: int = 0, offset: int = 0, digest: bytes = b"") -> BlockPiece:
    return BlockPiece(
        block_hash=b"h" * 32,
        offset=offset,
        total_bytes=total or len(data),
        data=data,
        payload_sha256=digest or sha256(data),
    )


async def test_a_bad_stream_stores_nothing_and_says_why(tls_files: Tls) -> None:
    async with cache_node(tls_files, max_block_bytes=1 << 20) as node:
        stream = Stream(tls_files, node.address)
        bad: list[tuple[list[pb.BlockNamespace | BlockPiece], str]] = [
            ([piece(b"data")], "namespace"),
            ([stream.namespace, stream.namespace], "namespace"),
            ([stream.namespace, piece(b"data", digest=b"\0" * 32)], "piece.payload_sha256"),
            ([stream.namespace, piece(b"data", total=8)], "piece"),
            ([stream.namespace, piece(b"data", offset=1)], "piece.offset"),
            ([stream.namespace, piece(b"data", total=2)], "piece.data"),
            ([stream.namespace, piece(b"data", total=2 << 20)], "piece.total_bytes"),
            ([stream.namespace, piece(b"da", total=4), piece(b"ta")], "piece.total_bytes"),
            ([stream.namespace, BlockPiece(block_hash=b"short")], "piece.block_hash"),
        ]
        for contents, field in bad:
            error = await stream.refusal(*contents)
            assert error.violations[0][0] == field, error
        assert len(node.store) == 0
        assert node.servicer.staging.num_bytes == 0


async def test_out_of_bounds_requests_are_invalid_and_harmless(tls_files: Tls) -> None:
    async with cache_node(tls_files) as node, cache_client(tls_files, node.address) as client:
        for wrong in ([], [b"short"], [b"h" * 33]):
            with pytest.raises(InvalidRequest):
                await client.lookup(ALICE, wrong)
        assert client.available
        assert len(await client.lookup(ALICE, hashes(BLOCKS))) == 0


@pytest.mark.parametrize("role", ["router", "cache"])
async def test_other_roles_may_not_read_or_store(tls_files: Tls, role: str) -> None:
    async with cache_node(tls_files) as node:
        channel = internal_channel(node.address, role="cache", tls=tls_files(role))
        stub = async_stub(channel)
        error = await error_of(stub.LookupBlocks(pb.LookupBlocksRequest()))
        assert isinstance(error, PermissionDenied)
        stats = stub.GetCacheStats(pb.GetCacheStatsRequest())
        if role == "router":
            assert (await stats).ram_blocks == 0
        else:
            assert isinstance(await error_of(stats), PermissionDenied)
        await channel.close()


async def test_no_certificate_no_answer(tls_files: Tls, dev_certs: object) -> None:
    async with cache_node(tls_files) as node:
        credentials = grpc.ssl_channel_credentials(tls_files("cache").ca.read_bytes())
        async with grpc.aio.secure_channel(node.address, credentials) as channel:
            stub = async_stub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetCacheStats(pb.GetCacheStatsRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_dead_cache_fails_fast_and_is_then_skipped(
    tls_files: Tls, free_port: Callable[[], int]
) -> None:
    port = free_port()
    async with cache_client(tls_files, f"127.0.0.1:{port}") as client:
        with pytest.raises(CacheUnavailable):
            await fetch_all(client, ALICE, hashes(BLOCKS))
        assert not client.available
        with pytest.raises(CacheUnavailable, match="skipped"):
            await client.store(ALICE, BLOCKS)
