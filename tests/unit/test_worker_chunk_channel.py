"""Many attempts' chunks in one stream: what gathers, what is bounded, how it ends."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from tidemill.api.common.v1.lifecycle_pb2 import FinishReason, PrefillDone
from tidemill.api.decode.v1.decode_service_pb2 import (
    ChunkRoute,
    Final,
    Start,
    WatchChunksResponse,
)
from tidemill.errors import AlreadyExists, InvalidRequest, Overloaded
from tidemill.worker.chunk_channel import (
    MAX_MESSAGE_TOKENS,
    MOST_CHANNELS,
    ChunkChannel,
    ChunkChannels,
)
from tidemill.worker.outbox import Outbox

ID = b"0123456789abcdef"
Messages = AsyncIterator[WatchChunksResponse]


def ignore() -> None:
    """An attempt that does not mind."""


def outbox(channel: ChunkChannel, number: int, *first_tokens: int) -> Outbox:
    """One that has told of its first tokens."""
    made = Outbox(number, pace_s=lambda: 0.0, channel=channel, number=number)
    channel.attach(number, ignore)
    made.prefill_done(PrefillDone(first_token_id=7, first_token_ids=first_tokens or (7,)))
    return made


async def opened(channel: ChunkChannel) -> Messages:
    messages = channel.messages()
    assert not (await anext(messages)).chunks
    return messages


async def test_what_comes_while_a_message_is_on_its_way_leaves_in_the_next_together() -> None:
    channel = ChunkChannel()
    messages = await opened(channel)
    boxes = {number: outbox(channel, number) for number in (3, 5)}
    boxes[3].tokens(1, [8])
    assert [each.number for each in (await anext(messages)).chunks] == [3]
    for index in (1, 2):
        boxes[5].tokens(index, [10 + index])
    boxes[3].tokens(2, [9])
    routed = (await anext(messages)).chunks
    found = {each.number: (each.chunk.first_index, list(each.chunk.token_ids)) for each in routed}
    assert found == {5: (1, [11, 12]), 3: (2, [9])}


async def test_ends_wait_for_no_chunk() -> None:
    channel = ChunkChannel()
    messages = await opened(channel)
    box = outbox(channel, 1, 7, 17)
    box.tokens(1, [18], choice=1)
    box.choice_ended(1, FinishReason.FINISH_REASON_STOP)
    box.close(Final(generated_tokens=3), None)
    said = [each.WhichOneof("event") async for each in box.responses()]
    assert said == ["prefill_done", "choice_ended", "final"]
    (routed,) = (await anext(messages)).chunks
    assert (routed.chunk.choice, list(routed.chunk.token_ids)) == (1, [18])


async def test_a_long_backlog_leaves_in_pieces_and_does_not_keep_others_waiting() -> None:
    channel = ChunkChannel()
    messages = await opened(channel)
    long, short = outbox(channel, 1), outbox(channel, 2)
    long.tokens(1, [9] * (2 * MAX_MESSAGE_TOKENS + 1))
    short.tokens(1, [8])
    sizes = [
        [(each.number, len(each.chunk.token_ids)) for each in (await anext(messages)).chunks]
        for _ in range(3)
    ]
    assert sizes == [
        [(1, MAX_MESSAGE_TOKENS)],
        [(2, 1), (1, MAX_MESSAGE_TOKENS - 1)],
        [(1, 2)],
    ]


async def test_a_stream_that_breaks_ends_its_attempts_once() -> None:
    channels, broken = ChunkChannels(), list[int]()
    with channels.open(ID) as channel:
        channel.attach(1, lambda: broken.append(1))
        channel.attach(2, lambda: broken.append(2))
        channel.detach(2)
    assert broken == [1]
    assert channels.route(Start(route=ChunkRoute(channel_id=ID, number=3))) is None


async def test_a_draining_channel_ends_with_its_last_attempt_and_loses_nothing() -> None:
    channels = ChunkChannels()
    with channels.open(ID) as channel:
        messages = await opened(channel)
        box = outbox(channel, 1)
        channels.drain()
        reading = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0.01)
        assert not reading.done()
        box.tokens(1, [8])
        box.close(Final(), None)
        assert [each.number for each in (await reading).chunks] == [1]
        with pytest.raises(StopAsyncIteration):
            await anext(messages)
    with channels.open(ID) as channel:  # one that comes too late for anything
        assert [each async for each in channel.messages()] == [WatchChunksResponse()]


async def test_names_are_used_once() -> None:
    channels = ChunkChannels()
    start = Start(route=ChunkRoute(channel_id=ID, number=1))
    assert channels.route(Start()) is None
    assert channels.route(start) is None
    with channels.open(ID) as channel:
        assert channels.route(start) is channel
        channel.attach(1, ignore)
        with pytest.raises(InvalidRequest):
            channels.route(start)
        with pytest.raises(AlreadyExists), channels.open(ID):
            pass
        assert channels.route(Start(route=ChunkRoute(channel_id=ID, number=2))) is channel


async def test_channels_are_bounded_in_number() -> None:
    channels = ChunkChannels()
    held = [channels.open(bytes([each]) * 16) for each in range(MOST_CHANNELS)]
    for each in held:
        each.__enter__()
    with pytest.raises(Overloaded), channels.open(ID):
        pass
    held.pop().__exit__(None, None, None)
    with channels.open(ID):
        pass
