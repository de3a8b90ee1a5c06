"""Chunks of many attempts in one stream, as a decode worker sends them."""

import asyncio
from pathlib import Path

import grpc

from tests.worker_harness import (
    RouterSide,
    Tls,
    both_roles,
    make_start,
    prompt_of,
    router_of,
    slow_down,
    worker_at,
)
from tidemill.api.common.v1.lifecycle_pb2 import AttemptId
from tidemill.api.decode.v1 import decode_service_pb2 as pb
from tidemill.errors import InvalidRequest
from tidemill.worker.config import Role

CHANNEL = b"0123456789abcdef"


class Channel:
    """A router's channel; `chunks` are those that came, by the attempt's number."""

    def __init__(self, router: RouterSide, channel_id: bytes = CHANNEL) -> None:
        self.call = router.stub.WatchChunks(pb.WatchChunksRequest(channel_id=channel_id))
        self.chunks: dict[int, list[pb.Chunk]] = {}

    async def open(self) -> None:
        assert not (await self._next()).chunks

    async def until(self, number: int, num_tokens: int) -> list[int]:
        """The attempt's tokens after the first ones, once there are so many."""
        async with asyncio.timeout(20):
            while len(self.tokens(number)) < num_tokens:
                for routed in (await self._next()).chunks:
                    self.chunks.setdefault(routed.number, []).append(routed.chunk)
        return self.tokens(number)

    def tokens(self, number: int) -> list[int]:
        return [token for chunk in self.chunks.get(number, []) for token in chunk.token_ids]

    async def _next(self) -> pb.WatchChunksResponse:
        message = await self.call.read()
        assert isinstance(message, pb.WatchChunksResponse)
        return message


def routed(start: pb.Start, number: int) -> pb.Start:
    start.route.CopyFrom(pb.ChunkRoute(channel_id=CHANNEL, number=number))
    return start


async def test_chunks_of_many_attempts_come_through_one_channel(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        whole = [await router.ask(make_start(prompt_of(20 + i), f"w{i}")) for i in range(3)]
        channel = Channel(router)
        await channel.open()
        starts = [routed(make_start(prompt_of(20 + i), f"r{i}"), i + 1) for i in range(3)]
        answers = await asyncio.gather(*(router.ask(start) for start in starts))
        for number, (answer, same) in enumerate(zip(answers, whole, strict=True), start=1):
            assert answer.events == ["prefill_done", "final"]
            assert answer.final.generated_tokens == len(same.tokens)
            rest = await channel.until(number, len(same.tokens) - 1)
            assert [*answer.tokens, *rest] == same.tokens
            assert channel.chunks[number][-1].generated_tokens == len(same.tokens)
        channel.call.cancel()


async def test_an_attempt_whose_channel_breaks_stops_and_keeps_its_final(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        channel = Channel(router)
        await channel.open()
        attempt = await router.begin(routed(make_start(prompt_of(20), "r", max_tokens=400), 1))
        in_call = await router.begin(make_start(prompt_of(20), "other", max_tokens=30))
        await channel.until(1, 3)
        channel.call.cancel()
        answer = await attempt.finish()
        assert answer.reason == "SERVER_FAULT"
        assert 4 <= answer.final.generated_tokens < 400
        kept = (
            await router.stub.GetFinal(
                pb.GetFinalRequest(id=AttemptId(request_id="r", attempt=1, fence=1))
            )
        ).final
        assert kept == answer.final
        assert (await in_call.finish()).reason == "LENGTH"


async def test_a_channel_that_is_not_open_is_as_good_as_none(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (_, router):
        answer = await router.ask(routed(make_start(prompt_of(20), "r"), 1))
        assert "chunk" in answer.events
        assert len(answer.tokens) == 8


async def test_a_channels_number_serves_one_attempt_at_a_time(
    model_dir: Path, tls_files: Tls
) -> None:
    async with both_roles(model_dir, tls_files) as (worker, router):
        slow_down(worker, 0.01)
        channel = Channel(router)
        await channel.open()
        first = await router.begin(routed(make_start(prompt_of(20), "a", max_tokens=50), 1))
        await first.until("prefill_done")
        second = await router.ask(routed(make_start(prompt_of(20), "b"), 1))
        assert isinstance(second.error, InvalidRequest)
        assert (await first.finish()).reason == "LENGTH"
        channel.call.cancel()


async def test_a_channel_does_not_hold_up_a_worker_that_drains(
    model_dir: Path, tls_files: Tls
) -> None:
    async with worker_at(Role.BOTH, model_dir, tls_files) as worker:
        slow_down(worker, 0.005)
        async with router_of(worker, tls_files) as router:
            channel = Channel(router)
            await channel.open()
            attempt = await router.begin(routed(make_start(prompt_of(20), "r", max_tokens=20), 1))
            await attempt.until("prefill_done")
            draining = asyncio.create_task(worker.drain())
            answer = await attempt.finish()
            await channel.until(1, answer.final.generated_tokens - 1)
            assert await channel.call.read() is grpc.aio.EOF
            await draining
