"""Prefill to decode over real mutual TLS: same tokens, same bytes, nothing left behind."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import torch

from tests.tiny_model import YARN, make_tiny_checkpoint
from tests.worker_harness import (
    Tls,
    check_whole,
    eventually,
    make_start,
    metric,
    prompt_of,
    router_of,
    settled,
    slow_down,
    worker_at,
)
from tests.x1 import reference_gaps
from tidemill.api.common.v1.kv_pb2 import KvSegment
from tidemill.api.prefill.v1 import prefill_service_pb2 as pb
from tidemill.api.prefill.v1.prefill_service_pb2_grpc import PrefillServiceStub
from tidemill.blocks import chain_hashes, root_hash
from tidemill.errors import FailedPrecondition, NotFound, WorkerLost
from tidemill.kv.transport import GrpcKvTransport, KvTransport
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.status import from_rpc_error
from tidemill.worker.config import HandoverConfig, Role
from tidemill.worker.process import RunningWorker

SMALL_MESSAGES = HandoverConfig(max_message_bytes=65_536)
LAYERS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), rope_parameters=YARN)


class TouchedTransport:
    """The gRPC transport with a hand in it: `touch(pull, messages)` may change what passes."""

    def __init__(self, inner: KvTransport, touch: "Touch") -> None:
        self._inner = inner
        self._touch = touch
        self.pulls = 0

    async def pull(
        self, handover: pb.HandoverRef, *, timeout_s: float, shm: pb.ShmTarget | None = None
    ) -> AsyncGenerator[Sequence[KvSegment], None]:
        self.pulls += 1
        async for segments in self._inner.pull(handover, timeout_s=timeout_s, shm=shm):
            await self._touch(self.pulls, segments)
            yield segments


Touch = Callable[[int, Sequence[KvSegment]], Any]


def touched(touch: Touch, made: list[TouchedTransport]) -> Callable[[Any], KvTransport]:
    def make(stub: Any) -> KvTransport:
        made.append(TouchedTransport(GrpcKvTransport(stub, max_message_bytes=65_536), touch))
        return made[-1]

    return make


async def flip(segments: Sequence[KvSegment]) -> None:
    data = segments[0].data
    segments[0].data = data[:-1] + bytes([data[-1] ^ 0x80])


@asynccontextmanager
async def stub_of(prefill: RunningWorker, tls: Tls) -> AsyncIterator[Any]:
    """A decode worker's stub of `prefill`."""
    channel = internal_channel(prefill.address, role="prefill", tls=tls("decode"))
    try:
        yield cast(Any, PrefillServiceStub(channel))
    finally:
        await channel.close()


def prefill_request(prefill: RunningWorker, num_tokens: int, request_id: str = "h1") -> Any:
    return pb.PrefillRequest(
        task=make_start(prompt_of(num_tokens), request_id).task,
        layout_fingerprint=prefill.worker.engine.layout.fingerprint(),
    )


async def test_split_workers_answer_as_one_worker_does(model_dir: Path, tls_files: Tls) -> None:
    prompt = prompt_of(200)
    async with (
        worker_at(Role.BOTH, model_dir, tls_files) as both,
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(both, tls_files) as one,
        router_of(decode, tls_files) as split,
    ):
        alone = await one.ask(make_start(prompt, max_tokens=24))
        answer = await split.ask(make_start(prompt, prefill=prefill, max_tokens=24))
        again = await split.ask(make_start(prompt, "r2", prefill=prefill, max_tokens=24))
        assert answer.error is None
        assert answer.reason == alone.reason == "LENGTH"
        gaps = await asyncio.to_thread(reference_gaps, model_dir, prompt + alone.tokens)
        for other in (answer, again):
            assert len(other.tokens) == 24
            for index, (ours, theirs) in enumerate(zip(other.tokens, alone.tokens, strict=True)):
                if gaps.excuses(len(prompt) + index - 1):
                    break
                assert ours == theirs
        await settled(both, prefill, decode)


async def test_seeded_draws_are_the_same_on_either_path(model_dir: Path, tls_files: Tls) -> None:
    prompt = prompt_of(100)
    async with (
        worker_at(Role.BOTH, model_dir, tls_files) as both,
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(both, tls_files) as one,
        router_of(decode, tls_files) as split,
    ):
        alone = await one.ask(make_start(prompt, temperature=0.8, seed=7))
        start = make_start(prompt, prefill=prefill, temperature=0.8, seed=7)
        assert (await split.ask(start)).tokens == alone.tokens


async def test_kv_lands_bitwise_as_it_was_computed(model_dir: Path, tls_files: Tls) -> None:
    prompt = prompt_of(256)
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files, handover=SMALL_MESSAGES) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files, handover=SMALL_MESSAGES) as decode,
        router_of(decode, tls_files) as router,
    ):
        start = make_start(prompt, prefill=prefill)
        await router.ask(start)
        layout = prefill.worker.engine.layout
        root = root_hash(layout.model_digest, layout.kv_format, start.task.cache_scope)
        hashes = chain_hashes(root, prompt)
        pools = [running.worker.engine.pool for running in (prefill, decode)]
        computed, landed = ([pool.read_block(b) for b in pool.claim(hashes)] for pool in pools)
        assert len(computed) == len(landed) == 4
        assert all(torch.equal(a, b) for a, b in zip(computed, landed, strict=True))
        assert torch.stack(computed).any()
        assert (
            metric(decode, "handover_bytes_total", direction="received") == 4 * layout.block_bytes
        )


async def test_only_what_decode_does_not_hold_is_moved(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
    ):
        first = await router.ask(make_start(prompt_of(128), "a", prefill=prefill))
        moved = metric(decode, "handover_bytes_total", direction="received")
        again = await router.ask(make_start(prompt_of(128), "b", prefill=prefill))
        assert metric(decode, "handover_bytes_total", direction="received") == moved
        assert again.tokens == first.tokens
        await router.ask(make_start(prompt_of(150), "c", prefill=prefill))
        token_bytes = moved / 128
        added = metric(decode, "handover_bytes_total", direction="received") - moved
        assert added == (150 - 128) * token_bytes
        await settled(prefill, decode)


async def test_the_first_token_is_relayed_before_the_last_layer_has_landed(
    model_dir: Path, tls_files: Tls
) -> None:
    gate = asyncio.Event()

    async def hold_last_layer(_pull: int, segments: Sequence[KvSegment]) -> None:
        if segments[-1].layer == LAYERS - 1:
            await gate.wait()

    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(
            Role.DECODE, model_dir, tls_files, make_transport=touched(hold_last_layer, [])
        ) as decode,
        router_of(decode, tls_files) as router,
    ):
        attempt = await router.begin(make_start(prompt_of(100), prefill=prefill))
        assert await attempt.next() == "prefill_done"
        assert decode.worker.num_waiting == 1
        gate.set()
        answer = await attempt.finish()
        assert len(answer.tokens) == 8
        await settled(prefill, decode)


async def test_layers_arrive_while_later_chunks_are_computed(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files, step_tokens=64) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        slow_down(prefill, 0.05)
        call = stub.Prefill(prefill_request(prefill, 640))
        offer = (await call.read()).offer
        ref = pb.HandoverRef(handover_id=offer.handover_id, epoch=offer.epoch)
        pull = aiter(stub.PullKv(pb.PullKvRequest(handover=ref)))
        first = await anext(pull)
        assert first.segments[0].first_token == 0
        assert prefill.worker.backlog.num_tokens > 0
        received = sum(s.num_tokens for s in first.segments)
        async for message in pull:
            assert sum(len(s.data) for s in message.segments) <= 2 << 20
            received += sum(s.num_tokens for s in message.segments)
        assert received == 640 * LAYERS
        assert (await call.read()).done.usage.computed_tokens == 640
        await call.read()
        assert (await stub.ReleaseHandover(pb.ReleaseHandoverRequest(handover=ref))).released
        await settled(prefill)


async def test_a_corrupt_segment_is_pulled_again(model_dir: Path, tls_files: Tls) -> None:
    made: list[TouchedTransport] = []

    async def flip_in_first_pull(pull: int, segments: Sequence[KvSegment]) -> None:
        if pull == 1:
            await flip(segments)

    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(
            Role.DECODE, model_dir, tls_files, make_transport=touched(flip_in_first_pull, made)
        ) as decode,
        router_of(decode, tls_files) as router,
    ):
        answer = await router.ask(make_start(prompt_of(200), prefill=prefill))
        assert answer.error is None
        assert len(answer.tokens) == 8
        assert made[0].pulls == 2
        assert metric(decode, "pull_retries_total") == 1
        await settled(prefill, decode)


async def test_a_transfer_corrupt_twice_fails_the_attempt_and_frees_all(
    model_dir: Path, tls_files: Tls
) -> None:
    async def flip_always(_pull: int, segments: Sequence[KvSegment]) -> None:
        await flip(segments)

    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(
            Role.DECODE, model_dir, tls_files, make_transport=touched(flip_always, [])
        ) as decode,
        router_of(decode, tls_files) as router,
    ):
        answer = await router.ask(make_start(prompt_of(200), prefill=prefill))
        assert isinstance(answer.error, WorkerLost)
        assert "checksum" in str(answer.error)
        assert answer.reason == "SERVER_FAULT"
        assert decode.worker.engine.pool.match(list(chain_of(decode, 200))) == 0
        await settled(prefill, decode)


def chain_of(running: RunningWorker, num_tokens: int) -> list[bytes]:
    layout = running.worker.engine.layout
    root = root_hash(layout.model_digest, layout.kv_format, b"s" * 32)
    return chain_hashes(root, prompt_of(num_tokens))


async def test_a_lease_that_runs_out_frees_the_blocks(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(
            Role.PREFILL, model_dir, tls_files, handover=HandoverConfig(lease_s=0.5)
        ) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        now = 0.0
        prefill.worker.handovers._clock = lambda: now
        call = stub.Prefill(prefill_request(prefill, 200))
        offer = (await call.read()).offer
        await call.read()
        assert len(prefill.worker.handovers) == 1
        assert prefill.worker.engine.pool.num_referenced == 4
        ref = pb.HandoverRef(handover_id=offer.handover_id, epoch=offer.epoch)
        now = 0.3
        await stub.RenewHandover(pb.RenewHandoverRequest(handover=ref))
        now = 0.6
        await asyncio.sleep(0.3)
        assert len(prefill.worker.handovers) == 1
        now = 1.0
        await eventually(lambda: prefill.worker.idle)
        check_whole(prefill.worker)
        assert metric(prefill, "handovers_total", state="expired") == 1
        for late in (
            stub.RenewHandover(pb.RenewHandoverRequest(handover=ref)),
            stub.PullKv(pb.PullKvRequest(handover=ref)).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await late
            assert isinstance(from_rpc_error(caught.value), NotFound)
        assert not (await stub.ReleaseHandover(pb.ReleaseHandoverRequest(handover=ref))).released


async def test_a_hand_over_of_an_earlier_epoch_is_refused(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        call = stub.Prefill(prefill_request(prefill, 100))
        offer = (await call.read()).offer
        ref = pb.HandoverRef(handover_id=offer.handover_id, epoch=offer.epoch ^ 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.PullKv(pb.PullKvRequest(handover=ref)).read()
        error = from_rpc_error(caught.value)
        assert isinstance(error, FailedPrecondition)
        assert error.reason == "STALE_EPOCH"
        call.cancel()
        await settled(prefill)


async def test_a_decode_worker_that_vanishes_stops_the_prefill(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files, step_tokens=32) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        slow_down(prefill, 0.05)
        call = stub.Prefill(prefill_request(prefill, 900))
        await call.read()
        await eventually(lambda: prefill.worker.backlog.num_tokens < 900)
        call.cancel()
        await settled(prefill)
        assert metric(prefill, "stopped_prefill_tokens_total") < 900
        assert metric(prefill, "handovers_total", state="aborted") == 1


async def test_a_prefill_worker_lost_after_the_first_token_leaves_a_final_that_counts_it(
    model_dir: Path, tls_files: Tls
) -> None:
    lost = asyncio.Event()

    async def hang_then_break(_pull: int, _segments: Sequence[KvSegment]) -> None:
        await lost.wait()
        raise grpc.aio.AioRpcError(
            grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "cut"
        )

    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(
            Role.DECODE, model_dir, tls_files, make_transport=touched(hang_then_break, [])
        ) as decode,
        router_of(decode, tls_files) as router,
    ):
        attempt = await router.begin(make_start(prompt_of(200), prefill=prefill))
        await attempt.until("prefill_done")
        lost.set()
        answer = await attempt.finish()
        assert isinstance(answer.error, WorkerLost)
        assert (answer.reason, answer.final.generated_tokens) == ("SERVER_FAULT", 1)
        assert answer.final.prompt == answer.usage
        await settled(decode)


async def test_a_failed_prefill_engine_is_a_lost_worker_with_the_error_id(
    model_dir: Path, tls_files: Tls
) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        worker_at(Role.DECODE, model_dir, tls_files) as decode,
        router_of(decode, tls_files) as router,
    ):

        def fail() -> list[Any]:
            raise RuntimeError("out of luck")

        prefill.worker.engine.step = fail  # type: ignore[method-assign]
        answer = await router.ask(make_start(prompt_of(200), prefill=prefill))
        assert isinstance(answer.error, WorkerLost)
        assert answer.error.metadata["error_id"]
        assert answer.reason == "SERVER_FAULT"
        await settled(prefill, decode)


async def test_a_worker_of_another_layout_is_refused(model_dir: Path, tls_files: Tls) -> None:
    async with (
        worker_at(Role.PREFILL, model_dir, tls_files) as prefill,
        stub_of(prefill, tls_files) as stub,
    ):
        request = prefill_request(prefill, 100)
        request.layout_fingerprint = b"x" * 32
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Prefill(request).read()
        assert from_rpc_error(caught.value).reason == "KV_LAYOUT_MISMATCH"
        await settled(prefill)
