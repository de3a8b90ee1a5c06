"""Where a prompt's blocks are found: device, host, cache, peers; and what a bad holder costs."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch

from tests.cache_node import cache_node
from tests.worker_harness import (
    PATIENT,
    SCOPE,
    Tls,
    both_roles,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    split_of,
    worker_at,
)
from tidemill.api.cache.v1 import cache_service_pb2 as cache_pb
from tidemill.api.cache.v1.cache_service_pb2_grpc import CacheServiceStub
from tidemill.api.common.v1.lifecycle_pb2 import KvPeer
from tidemill.api.worker.v1 import worker_service_pb2 as worker_pb
from tidemill.errors import InvalidRequest, PermissionDenied, TidemillError
from tidemill.kv.cache_client import CacheClient
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.status import from_rpc_error
from tidemill.worker.config import CacheConfig, Role
from tidemill.worker.process import RunningWorker

OTHER_SCOPE = b"o" * 32


def evict_device(running: RunningWorker) -> None:
    """Fill the device pool once, so that all it held is demoted or gone."""
    pool = running.worker.engine.pool
    pool.release(pool.allocate(pool.num_free))


def peer_of(running: RunningWorker, role: str) -> KvPeer:
    return KvPeer(worker_id=running.worker.worker_id, address=running.address, role=role)


def start_with(token_ids: list[int], request_id: str, *peers: KvPeer, **options: Any) -> Any:
    start = make_start(token_ids, request_id, **options)
    start.task.peers.extend(peers)
    return start


def latents_of(running: RunningWorker, hashes: list[bytes]) -> list[torch.Tensor]:
    found = [running.worker.engine.pool.read_committed(each) for each in hashes]
    assert all(values is not None for values in found)
    return cast(list[torch.Tensor], found)


async def test_what_the_device_evicted_is_reused_from_host_memory(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files, host_cache_blocks=64) as (worker, router):
        first = await router.ask(make_start(prompt_of(300), "a"))
        assert split_of(first.usage) == {"computed": 300}
        prompt = await worker.worker.reuse.identify(make_start(prompt_of(300)).task)
        before = latents_of(worker, list(prompt.hashes))
        evict_device(worker)
        again = await router.ask(make_start(prompt_of(300), "b"))
        assert split_of(again.usage) == {"host": 256, "computed": 44}
        assert again.tokens == first.tokens
        after = latents_of(worker, list(prompt.hashes))
        assert all(one.equal(other) for one, other in zip(before, after, strict=True))
        assert split_of((await router.ask(make_start(prompt_of(300), "c"))).usage) == {
            "device": 256,
            "computed": 44,
        }
        assert metric(worker, "reused_tokens_total", tier="host") == 256


async def test_load_shows_the_host_tier(model_dir: Path, tls_files: Tls) -> None:
    async with both_roles(model_dir, tls_files, host_cache_blocks=64) as (worker, router):
        await router.ask(make_start(prompt_of(300), "a"))
        evict_device(worker)
        device, host = worker.worker.load().tiers
        assert device.tier == worker_pb.KV_TIER_DEVICE
        assert (host.tier, host.total_blocks, host.free_blocks) == (
            worker_pb.KV_TIER_HOST,
            64,
            64,
        )
        assert metric(worker, "host_blocks_held") >= 4
    async with both_roles(model_dir, tls_files) as (worker, _):
        assert [tier.tier for tier in worker.worker.load().tiers] == [worker_pb.KV_TIER_DEVICE]


async def test_a_decode_worker_pulls_only_what_its_host_memory_lacks(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files, host_cache_blocks=64) as decode,
        router_of(decode, tls_files) as router,
    ):
        first = await router.ask(make_start(prompt_of(300), "a", prefill=prefill))
        pulled = metric(decode, "handover_bytes_total", direction="received")
        evict_device(decode)
        again = await router.ask(make_start(prompt_of(300), "b", prefill=prefill))
        assert again.tokens == first.tokens
        assert metric(decode, "handover_bytes_total", direction="received") < 1.3 * pulled
        await settled(prefill, decode)


async def test_a_chain_goes_on_from_host_to_cache_to_host(model_dir: Path, tls_files: Tls) -> None:
    async with cache_node(tls_files) as cache, AsyncExitStack() as stack:
        shared = CacheConfig(cache.address, client=PATIENT)
        worker, router = await stack.enter_async_context(
            both_roles(model_dir, tls_files, host_cache_blocks=64, cache=shared)
        )
        first = await router.ask(make_start(prompt_of(400), "a", max_tokens=1))
        await eventually(lambda: len(cache.store) == 6)
        evict_device(worker)
        pool = worker.worker.engine.pool
        prompt = await worker.worker.reuse.identify(make_start(prompt_of(400)).task)
        forget_on_host(worker, prompt.hashes[2:4])
        pool.release(pool.claim(prompt.hashes[:1]))
        again = await router.ask(make_start(prompt_of(400), "b", max_tokens=1))
        assert split_of(again.usage) == {
            "device": 64,
            "host": 64 + 128,
            "cache_ram": 128,
            "computed": 16,
        }
        assert again.tokens == first.tokens


async def test_what_is_computed_as_the_quicker_way_is_counted(
    model_dir: Path, tls_files: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cache_node(tls_files) as cache, AsyncExitStack() as stack:
        shared = CacheConfig(cache.address, client=PATIENT)
        worker, router = await stack.enter_async_context(
            both_roles(model_dir, tls_files, cache=shared)
        )
        await router.ask(make_start(prompt_of(400), "a", max_tokens=1))
        await eventually(lambda: len(cache.store) == 6)
        evict_device(worker)
        monkeypatch.setattr(worker.worker.reuse.policy, "choose", lambda _: 2)
        again = await router.ask(make_start(prompt_of(400), "b", max_tokens=1))
        assert split_of(again.usage) == {"cache_ram": 128, "computed": 272}
        assert metric(worker, "fetch_skipped_blocks_total", tier="cache_ram") == 4


def forget_on_host(running: RunningWorker, hashes: tuple[bytes, ...]) -> None:
    host = running.worker.engine.pool._host
    for block_hash in hashes:
        slot = host._slots.pop(block_hash)
        del host._evictable[block_hash]
        host._free.append(slot.index)


@pytest.mark.parametrize("tier", ["device", "host"])
async def test_a_peer_is_asked_for_what_nobody_nearer_holds(
    model_dir: Path, tls_files: Tls, tier: str
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files, host_cache_blocks=64) as holder,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        both_roles(model_dir, tls_files, worker_id="asker") as (asker, router),
        router_of(decode, tls_files) as elsewhere,
    ):
        first = await elsewhere.ask(make_start(prompt_of(300), "a", prefill=holder))
        if tier == "host":
            evict_device(holder)
        start = start_with(prompt_of(300), "b", peer_of(holder, "prefill"))
        again = await router.ask(start)
        assert split_of(again.usage) == {"peer": 256, "computed": 44}
        assert again.tokens == first.tokens
        assert metric(asker, "reused_tokens_total", tier="peer") == 256
        assert metric(holder, "peer_served_blocks_total") == 4
        prompt = await asker.worker.reuse.identify(start.task)
        for mine, theirs in zip(
            latents_of(asker, list(prompt.hashes)),
            latents_of(holder, list(prompt.hashes)),
            strict=True,
        ):
            assert mine.equal(theirs)
        await settled(holder, decode)


async def test_what_a_decode_worker_generated_is_found_there(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
    ):
        first = await router.ask(make_start(prompt_of(100), "a", prefill=prefill, max_tokens=93))
        turn = prompt_of(100) + first.tokens + prompt_of(20, seed=4)
        start = start_with(turn, "b", peer_of(decode, "decode"), prefill=prefill)
        second = await router.ask(start)
        assert split_of(second.usage) == {"device": 64, "peer": 128, "computed": 21}
        await settled(prefill, decode)


async def test_another_scope_finds_nothing_at_a_peer(model_dir: Path, tls_files: Tls) -> None:
    async with (
        both_roles(model_dir, tls_files, worker_id="holder") as (holder, first),
        both_roles(model_dir, tls_files, worker_id="asker") as (_, router),
    ):
        await first.ask(make_start(prompt_of(200), "a"))
        peer = peer_of(holder, "decode")
        answer = await router.ask(start_with(prompt_of(200), "b", peer, scope=OTHER_SCOPE))
        assert split_of(answer.usage) == {"computed": 200}
        assert metric(holder, "peer_served_blocks_total") == 0

        # Not even who knows the hashes, and says another scope or layout.
        prompt = await holder.worker.reuse.identify(make_start(prompt_of(200)).task)
        right = prompt.namespace
        async with peer_client(holder, tls_files) as client:
            assert len(await client.lookup(right, prompt.hashes)) == 3
            for wrong in (
                replace(right, cache_scope=OTHER_SCOPE),
                replace(right, layout_fingerprint=b"L" * 32),
            ):
                assert len(await client.lookup(wrong, prompt.hashes)) == 0
                held = replace(await client.lookup(right, prompt.hashes), namespace=wrong)
                assert [each async for each in client.fetch_held(held)] == []


@asynccontextmanager
async def peer_client(
    running: RunningWorker, tls: Tls, *, role: str = "prefill"
) -> AsyncIterator[CacheClient]:
    client = CacheClient(
        internal_channel(running.address, role="decode", tls=tls(role)), PATIENT, peer=True
    )
    try:
        yield client
    finally:
        await client.close()


async def test_only_workers_are_served_and_nothing_is_stored(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, _):
        namespace = cache_pb.BlockNamespace(
            tenant_id="alice", cache_scope=SCOPE, layout_fingerprint=b"L" * 32, model="tiny"
        )
        request = cache_pb.LookupBlocksRequest(namespace=namespace, block_hashes=[b"h" * 32])
        for role in ("router", "cache"):
            channel = internal_channel(worker.address, role="decode", tls=tls_files(role))
            stub = cast(Any, CacheServiceStub(channel))
            assert isinstance(await error_of(stub.LookupBlocks(request)), PermissionDenied)
            await channel.close()
        channel = internal_channel(worker.address, role="decode", tls=tls_files("prefill"))
        stub = cast(Any, CacheServiceStub(channel))
        assert list((await stub.LookupBlocks(request)).tiers) == []
        stats = stub.GetCacheStats(cache_pb.GetCacheStatsRequest())
        assert isinstance(await error_of(stats), PermissionDenied)
        empty = cache_pb.LookupBlocksRequest(namespace=namespace)
        assert isinstance(await error_of(stub.LookupBlocks(empty)), InvalidRequest)
        await channel.close()


async def error_of(call: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_prompt_whose_own_tokens_are_scored_reuses_nothing(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, _):
        task = make_start(prompt_of(200)).task
        assert len(worker.worker.reuse.reusable(await worker.worker.reuse.identify(task))) == 3
        task.sampling.prompt_logprobs = 0
        assert worker.worker.reuse.reusable(await worker.worker.reuse.identify(task)) == ()


@pytest.mark.parametrize("num_blocks", [1, 96])
async def test_a_worker_knows_what_computing_costs_before_its_first_prompt(
    model_dir: Path, tls_files: Tls, num_blocks: int
) -> None:
    async with both_roles(model_dir, tls_files, num_blocks=num_blocks) as (worker, _):
        assert 0 < worker.worker.reuse.policy.compute_s(1) < 60
        worker.worker.engine.pool.check_idle()
