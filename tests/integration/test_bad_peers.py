"""Peers that lie, stall or are gone: what they say is checked, and the rest is computed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from typing_extensions import override

from tests.worker_harness import (
    Tls,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    worker_at,
)
from tidemill.api.cache.v1 import cache_service_pb2 as pb
from tidemill.api.cache.v1.cache_service_pb2_grpc import (
    CacheServiceServicer,
    add_CacheServiceServicer_to_server,
)
from tidemill.api.common.v1.kv_pb2 import BlockPiece
from tidemill.api.common.v1.lifecycle_pb2 import KvPeer
from tidemill.kv.cache_client import CacheClientConfig
from tidemill.kv.pieces import sha256
from tidemill.policy import FetchConfig
from tidemill.rpc.tls import server_credentials
from tidemill.worker.config import Role

BLOCK_BYTES = 3 * 64 * 48 * 4  # of the tiny model, in float32
SOUND = bytes(BLOCK_BYTES)

Say = Callable[[bytes], BlockPiece]


def piece(block_hash: bytes, data: bytes = SOUND, **lies: Any) -> BlockPiece:
    said = {
        "block_hash": block_hash,
        "total_bytes": len(data),
        "data": data,
        "payload_sha256": sha256(data),
    }
    return BlockPiece(**{**said, **lies})


class Liar(CacheServiceServicer):
    """Says that it holds twice what it is asked for, partly elsewhere, and sends what it likes."""

    def __init__(self, say: Say | None) -> None:
        self.num_asked = 0
        self._say = say

    @override
    async def LookupBlocks(
        self, request: pb.LookupBlocksRequest, context: Any
    ) -> pb.LookupBlocksResponse:
        self.num_asked += 1
        num_blocks = len(request.block_hashes)
        return pb.LookupBlocksResponse(
            tiers=[pb.CACHE_TIER_RAM] * 2 * num_blocks,
            total_bytes=1 << 60,
            holders=[pb.BlockHolder(num_blocks=num_blocks), pb.BlockHolder(address="x:1")],
        )

    @override
    async def StoreBlocks(
        self, request_iterator: AsyncIterator[pb.StoreBlocksRequest], context: Any
    ) -> pb.StoreBlocksResponse:
        raise NotImplementedError

    @override
    async def GetCacheStats(
        self, request: pb.GetCacheStatsRequest, context: Any
    ) -> pb.GetCacheStatsResponse:
        raise NotImplementedError

    @override
    async def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: Any
    ) -> AsyncIterator[pb.FetchBlocksResponse]:
        if self._say is None:
            await asyncio.sleep(60)
            return
        for block_hash in request.block_hashes:
            yield pb.FetchBlocksResponse(piece=self._say(block_hash), tier=pb.CACHE_TIER_DISK)


@asynccontextmanager
async def lying_peer(tls: Tls, liar: Liar, *, role: str = "prefill") -> AsyncIterator[KvPeer]:
    server = grpc.aio.server()
    add_CacheServiceServicer_to_server(liar, server)
    credentials = server_credentials(tls(role), client_certs=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield KvPeer(worker_id="liar", address=f"127.0.0.1:{port}", role="prefill")
    finally:
        await server.stop(0)


async def ask(
    model_dir: Path, tls: Tls, peer: KvPeer, *, num_times: int = 1, **settings: Any
) -> dict[str, float]:
    """Ask fresh prompts of five blocks and a bit; what was reused and what failed.

    One prompt is computed before, so that the worker knows what computing takes.
    """
    async with (
        worker_at(Role.BOTH, model_dir, tls, worker_id="asker", **settings) as worker,
        router_of(worker, tls) as router,
    ):
        await router.ask(make_start(prompt_of(330, seed=99), "first", max_tokens=1))
        num_peer_tokens = 0
        for seed in range(num_times):
            start = make_start(prompt_of(330, seed=seed), f"q{seed}", max_tokens=1)
            start.task.peers.append(peer)
            answer = await router.ask(start)
            assert answer.error is None
            usage = answer.usage
            assert usage.computed_tokens + usage.reused_peer_tokens == usage.prompt_tokens == 330
            num_peer_tokens += usage.reused_peer_tokens
        await settled(worker)
        failed = {
            cause: metric(worker, "fetch_failed_blocks_total", tier="peer", cause=cause)
            for cause in ("missing", "unavailable", "cut")
        }
        errors = metric(worker, "cache_errors_total", call="peer")
        return {"reused": num_peer_tokens, "errors": errors, **failed}


LIES: dict[str, Say] = {
    "another block": lambda _: piece(b"\1" * 32),
    "a checksum that is not its": lambda name: piece(name, payload_sha256=b"\2" * 32),
    "a block of another size": lambda name: piece(name, bytes(64)),
    "a block without an end": lambda name: piece(name, total_bytes=1 << 31),
    "more than it announced": lambda name: piece(name, total_bytes=10),
    "nothing": lambda name: piece(name, b"", total_bytes=10),
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_computed_instead(model_dir: Path, tls_files: Tls, lie: str) -> None:
    async with lying_peer(tls_files, Liar(LIES[lie])) as peer:
        assert await ask(model_dir, tls_files, peer) == {
            "reused": 0,
            "missing": 5,
            "unavailable": 0,
            "cut": 0,
            "errors": 0,
        }


async def test_a_peers_blocks_are_of_the_peer_tier_whatever_it_says(
    model_dir: Path, tls_files: Tls
) -> None:
    async with lying_peer(tls_files, Liar(piece)) as peer:
        found = await ask(model_dir, tls_files, peer)
        assert found["reused"] == 320


async def test_a_peer_that_stalls_is_skipped_until_its_pause_is_over(
    model_dir: Path, tls_files: Tls
) -> None:
    impatient = CacheClientConfig(lookup_s=10, stall_s=0.1, pause_s=30, most_pause_s=30)
    liar = Liar(None)
    async with lying_peer(tls_files, liar) as peer:
        found = await ask(model_dir, tls_files, peer, num_times=3, peers=impatient)
        assert found == {"reused": 0, "missing": 0, "unavailable": 5, "cut": 0, "errors": 3}
        assert liar.num_asked == 1


async def test_a_stall_is_cut_at_the_budget(model_dir: Path, tls_files: Tls) -> None:
    patient = CacheClientConfig(lookup_s=10, stall_s=30)
    async with lying_peer(tls_files, Liar(None)) as peer:
        async with asyncio.timeout(20):
            found = await ask(
                model_dir, tls_files, peer, num_times=4, peers=patient, fetch=FetchConfig()
            )
        assert (found["reused"], found["errors"]) == (0, 0)


async def test_a_peer_that_is_gone_is_tried_once(
    model_dir: Path, tls_files: Tls, free_port: Any
) -> None:
    gone = KvPeer(worker_id="gone", address=f"127.0.0.1:{free_port()}", role="decode")
    found = await ask(model_dir, tls_files, gone, num_times=2)
    assert found == {"reused": 0, "missing": 0, "unavailable": 0, "cut": 0, "errors": 2}


async def test_another_role_is_not_taken_for_a_peer(model_dir: Path, tls_files: Tls) -> None:
    async with lying_peer(tls_files, Liar(piece), role="cache") as peer:
        found = await ask(model_dir, tls_files, peer)
        assert (found["reused"], found["errors"]) == (0, 1)
