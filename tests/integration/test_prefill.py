"""What a prefill worker admits, reuses, counts and gives back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from services.cache.node import CacheNode
from tests.cache_node import cache_node
from tests.worker_harness import (
    Answer,
    RouterSide,
    Tls,
    check_whole,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    slow_down,
    split_of,
    worker_at,
)
from tidemill.api.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tidemill.errors import (
    AlreadyExists,
    InvalidRequest,
    PermissionDenied,
    PrefillFull,
    TidemillError,
    WorkerLost,
)
from tidemill.kv.cache_client import CacheClientConfig
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.status import from_rpc_error
from tidemill.worker.config import CacheConfig, Role
from tidemill.worker.process import RunningWorker

PATIENT = CacheClientConfig(lookup_s=10, stall_s=10, pause_s=0.2, most_pause_s=1)
OTHER_SCOPE = b"o" * 32


class Split:
    """A prefill and a decode worker, and a router's side of the latter."""

    def __init__(self, prefill: RunningWorker, decode: RunningWorker, router: RouterSide) -> None:
        self.prefill = prefill
        self.decode = decode
        self.router = router
        self._asked = 0

    async def ask(self, token_ids: list[int], **options: Any) -> Answer:
        self._asked += 1
        options.setdefault("prefill", self.prefill)
        options.setdefault("max_tokens", 4)
        return await self.router.ask(make_start(token_ids, f"q{self._asked}", **options))


@asynccontextmanager
async def split_workers(
    model_dir: Path, tls: Tls, *, cache: CacheNode | None = None, **settings: Any
) -> AsyncIterator[Split]:
    if cache is not None:
        settings["cache"] = CacheConfig(cache.address, client=PATIENT)
    async with (
        worker_at(Role.PREFILL, model_dir, tls, **settings) as prefill,
        worker_at(Role.DECODE, model_dir, tls) as decode,
        router_of(decode, tls) as router,
    ):
        yield Split(prefill, decode, router)
        await settled(prefill, decode)


@asynccontextmanager
async def stub_of(running: RunningWorker, tls: Tls, *, role: str = "decode") -> AsyncIterator[Any]:
    channel = internal_channel(running.address, role="prefill", tls=tls(role))
    try:
        yield cast(Any, PrefillServiceStub(channel))
    finally:
        await channel.close()


def request_of(prefill: RunningWorker, token_ids: list[int], request_id: str = "h1") -> Any:
    return pb.PrefillRequest(
        task=make_start(token_ids, request_id).task,
        layout_fingerprint=prefill.worker.engine.layout.fingerprint(),
    )


async def error_of(call: Any) -> TidemillError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 128, 129, 300])
async def test_a_prompt_seen_before_is_a_hit_but_for_its_last_token_or_unfinished_block(
    model_dir: Path, tls_files: Tls, num_tokens: int
) -> None:
    async with split_workers(model_dir, tls_files) as split:
        first = await split.ask(prompt_of(num_tokens))
        again = await split.ask(prompt_of(num_tokens))
        assert split_of(first.usage) == {"computed": num_tokens}
        hit = min(num_tokens // 64 * 64, num_tokens - 1)
        expected = {"computed": num_tokens - hit} | ({"device": hit} if hit else {})
        assert split_of(again.usage) == expected
        assert again.tokens == first.tokens
        assert metric(split.prefill, "computed_tokens_total") == 2 * num_tokens - hit
        assert metric(split.prefill, "reused_tokens_total", tier="device") == hit
        assert again.usage.prefill_worker_id == "prefill"


async def test_a_shared_prefix_is_reused_in_whole_blocks(model_dir: Path, tls_files: Tls) -> None:
    async with split_workers(model_dir, tls_files) as split:
        await split.ask(prompt_of(200))
        longer = await split.ask(prompt_of(210) + prompt_of(100, seed=2))
        assert split_of(longer.usage) == {"device": 192, "computed": 118}
        other = await split.ask(prompt_of(100) + prompt_of(100, seed=3))
        assert split_of(other.usage) == {"device": 64, "computed": 136}


async def test_no_scope_is_served_from_another(model_dir: Path, tls_files: Tls) -> None:
    async with (
        cache_node(tls_files) as cache,
        split_workers(model_dir, tls_files, cache=cache) as split,
    ):
        await split.ask(prompt_of(200))
        await eventually(lambda: len(cache.store) == 3)
        answer = await split.ask(prompt_of(200), scope=OTHER_SCOPE)
        assert split_of(answer.usage) == {"computed": 200}


async def test_another_worker_reuses_what_the_cache_service_holds(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        cache_node(tls_files) as cache,
        split_workers(model_dir, tls_files, cache=cache) as one,
        split_workers(model_dir, tls_files, cache=cache) as other,
    ):
        first = await one.ask(prompt_of(200))
        await eventually(lambda: len(cache.store) == 3)
        fetched = await other.ask(prompt_of(200))
        assert split_of(fetched.usage) == {"cache_ram": 192, "computed": 8}
        assert fetched.tokens == first.tokens
        assert fetched.done is not None
        assert fetched.done.fetch_us > 0
        again = await other.ask(prompt_of(260))
        assert split_of(again.usage) == {"device": 192, "computed": 68}


async def test_the_next_turn_reuses_what_decode_generated_and_cached(
    model_dir: Path, tls_files: Tls
) -> None:
    async with cache_node(tls_files) as cache, AsyncExitStack() as stack:
        shared = CacheConfig(cache.address, client=PATIENT)
        prefill, decode, fresh = [
            await stack.enter_async_context(
                worker_at(role, model_dir, tls_files, worker_id=name, cache=shared)
            )
            for role, name in ((Role.PREFILL, "p"), (Role.DECODE, "d"), (Role.PREFILL, "fresh"))
        ]
        router = await stack.enter_async_context(router_of(decode, tls_files))
        first = await router.ask(make_start(prompt_of(100), "a", prefill=prefill, max_tokens=93))
        await eventually(lambda: len(cache.store) == 3)
        turn = prompt_of(100) + first.tokens + prompt_of(20, seed=4)
        second = await router.ask(make_start(turn, "b", prefill=prefill))
        assert split_of(second.usage) == {"device": 64, "cache_ram": 128, "computed": 21}
        third = await router.ask(make_start(turn, "c", prefill=fresh))
        assert split_of(third.usage) == {"cache_ram": 192, "computed": 21}
        assert third.tokens == second.tokens
        await settled(prefill, decode, fresh)


async def test_cached_kv_is_bitwise_what_was_computed(model_dir: Path, tls_files: Tls) -> None:
    async with (
        cache_node(tls_files) as cache,
        split_workers(model_dir, tls_files, cache=cache) as one,
        split_workers(model_dir, tls_files, cache=cache) as other,
    ):
        await one.ask(prompt_of(200))
        await eventually(lambda: len(cache.store) == 3)
        await other.ask(prompt_of(200))
        blocks = []
        for side in (one, other):
            worker = side.prefill.worker
            prompt = await worker.reuse.identify(make_start(prompt_of(200)).task)
            claimed = worker.engine.pool.claim(prompt.hashes)
            blocks.append([worker.engine.pool.read_block(block) for block in claimed])
            worker.engine.pool.release(claimed)
        assert len(blocks[0]) == len(blocks[1]) == 3
        assert all(a.equal(b) for a, b in zip(*blocks, strict=True))


async def test_a_corrupt_cache_block_is_computed_and_counted(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        cache_node(tls_files) as cache,
        split_workers(model_dir, tls_files, cache=cache) as one,
        split_workers(model_dir, tls_files, cache=cache) as other,
    ):
        first = await one.ask(prompt_of(200))
        await eventually(lambda: len(cache.store) == 3)
        worker = one.prefill.worker
        prompt = await worker.reuse.identify(make_start(prompt_of(200)).task)
        corrupt_in_cache(cache, prompt.hashes[1])
        answer = await other.ask(prompt_of(200))
        assert split_of(answer.usage) == {"cache_ram": 64, "computed": 136}
        assert answer.tokens == first.tokens
        assert (
            metric(other.prefill, "fetch_failed_blocks_total", tier="cache_ram", cause="missing")
            == 2
        )


def corrupt_in_cache(cache: CacheNode, block_hash: bytes) -> None:
    stored = dict(cache.store)[block_hash]
    object.__setattr__(stored, "payload", b"\0" * len(stored.payload))


async def test_serving_goes_on_without_the_cache(
    model_dir: Path, tls_files: Tls, free_port: Any
) -> None:
    gone = CacheConfig(f"127.0.0.1:{free_port()}")
    async with split_workers(model_dir, tls_files) as split, AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(
            worker_at(Role.PREFILL, model_dir, tls_files, worker_id="uncached", cache=gone)
        )
        first = await split.ask(prompt_of(200))
        answer = await split.ask(prompt_of(200), prefill=prefill)
        assert answer.tokens == first.tokens
        assert split_of(answer.usage) == {"computed": 200}
        assert metric(prefill, "cache_errors_total", call="fetch") == 1
        await eventually(lambda: metric(prefill, "cache_dropped_blocks_total") == 3)
        assert prefill.worker.readiness() is None
        await settled(prefill)


async def test_a_backlog_beyond_the_bound_is_refused_until_it_has_shrunk(
    model_dir: Path, tls_files: Tls
) -> None:
    async with split_workers(model_dir, tls_files, max_queued_tokens=400) as split:
        slow_down(split.prefill, 0.05)
        start = make_start(prompt_of(500), "big", prefill=split.prefill)
        big = await split.router.begin(start)
        await eventually(lambda: split.prefill.worker.backlog.num_tokens > 0)
        refused = await split.ask(prompt_of(350, seed=2))
        assert isinstance(refused.error, PrefillFull)
        assert refused.error.retry_after_s is not None
        assert refused.events == []
        assert metric(split.prefill, "refusals_total", reason="PREFILL_FULL") == 1
        assert (await big.finish()).error is None
        assert (await split.ask(prompt_of(350, seed=2))).error is None


async def test_a_full_pool_refuses_and_keeps_what_it_has(model_dir: Path, tls_files: Tls) -> None:
    async with split_workers(model_dir, tls_files, num_blocks=8) as split:
        slow_down(split.prefill, 0.05)
        start = make_start(prompt_of(400), "big", prefill=split.prefill)
        big = await split.router.begin(start)
        await eventually(lambda: split.prefill.worker.engine.pool.num_referenced == 7)
        refused = await split.ask(prompt_of(100, seed=2))
        assert isinstance(refused.error, PrefillFull)
        assert (await big.finish()).error is None
        too_long = await split.ask(prompt_of(600))
        assert too_long.error is not None
        assert too_long.error.reason == "KV_POOL_TOO_SMALL"


async def test_stop_reaches_a_prefill_between_chunks(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files, step_tokens=64) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        slow_down(prefill, 0.05)
        request = request_of(prefill, prompt_of(900))
        call = stub.Prefill(request)
        await call.read()
        await eventually(lambda: prefill.worker.backlog.num_tokens < 900)
        stop = pb.StopPrefillRequest(id=request.task.id)
        answer = await stub.StopPrefill(stop)
        assert answer.stopped
        assert 0 < answer.computed_tokens < 900
        assert answer.computed_tokens % 64 == 0
        assert (await error_of(call.read())).reason == "CANCELLED"
        assert not (await stub.StopPrefill(stop)).stopped
        await settled(prefill)
        whole_blocks = metric(prefill, "stopped_prefill_tokens_total") // 64
        prompt = await prefill.worker.reuse.identify(request.task)
        assert prefill.worker.engine.pool.match(prompt.hashes) == whole_blocks > 0


async def test_one_attempt_prefills_once_at_a_time(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        slow_down(prefill, 0.05)
        request = request_of(prefill, prompt_of(600))
        call = stub.Prefill(request)
        await call.read()
        assert isinstance(await error_of(stub.Prefill(request).read()), AlreadyExists)
        call.cancel()
        await settled(prefill)


async def test_bad_prompts_are_refused_by_field(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        for token_ids in ([], [5, 512], prompt_of(1024)):
            error = await error_of(stub.Prefill(request_of(prefill, token_ids)).read())
            assert isinstance(error, InvalidRequest)
            assert error.violations[0][0] == "task.token_ids"
        request = request_of(prefill, prompt_of(100))
        request.held_tokens = 101
        assert isinstance(await error_of(stub.Prefill(request).read()), InvalidRequest)
        request = request_of(prefill, prompt_of(100))
        request.task.model_digest = b"m" * 32
        assert (await error_of(stub.Prefill(request).read())).reason == "MODEL_MISMATCH"
        request = request_of(prefill, prompt_of(100))
        request.kv_transport = "carrier pigeon"
        assert isinstance(await error_of(stub.Prefill(request).read()), InvalidRequest)
        await settled(prefill)


async def test_only_the_right_role_gets_in(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        stub_of(prefill, tls_files, role="router") as as_router,
        stub_of(prefill, tls_files, role="cache") as as_cache,
    ):
        for stub in (as_router, as_cache):
            call = stub.Prefill(request_of(prefill, prompt_of(10)))
            assert isinstance(await error_of(call.read()), PermissionDenied)
        async with worker_at(Role.DECODE, model_dir, tls_files) as decode:
            channel = internal_channel(decode.address, role="decode", tls=tls_files("prefill"))
            stub = cast(Any, DecodeServiceStub(channel))
            assert isinstance(await error_of(stub.Decode().read()), PermissionDenied)
            await channel.close()


async def test_a_decode_worker_does_not_take_another_role_for_a_prefill_worker(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.DECODE, model_dir, tls_files, worker_id="impostor") as impostor,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
    ):
        answer = await router.ask(make_start(prompt_of(100), prefill=impostor))
        assert isinstance(answer.error, WorkerLost)
        await settled(decode)


async def test_a_draining_worker_takes_nothing_new(model_dir: Path, tls_files: Tls) -> None:
    async with split_workers(model_dir, tls_files) as split:
        split.prefill.worker.draining = True
        refused = await split.ask(prompt_of(100))
        assert isinstance(refused.error, PrefillFull)
        assert split.prefill.worker.readiness() == "draining"
        await asyncio.sleep(0)
        check_whole(split.prefill.worker)
