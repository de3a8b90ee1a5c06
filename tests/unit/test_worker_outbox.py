import asyncio

from tidemill.api.common.v1.lifecycle_pb2 import FinishReason, PrefillDone
from tidemill.api.decode.v1.decode_service_pb2 import DecodeResponse, Final
from tidemill.engine import TokenLogprobs
from tidemill.rpc.options import INTERNAL_MESSAGE_BYTES
from tidemill.worker.chunk_channel import MAX_MESSAGE_TOKENS
from tidemill.worker.outbox import Outbox

STOP = FinishReason.FINISH_REASON_STOP
# As long as it gets on the wire: ids of a large vocabulary, twenty alternatives.
LONGEST = TokenLogprobs(-12.345678, tuple(range(129_000, 129_020)), tuple([-12.345678] * 20))


async def told(outbox: Outbox) -> list[DecodeResponse]:
    outbox.close(Final(), None)
    return [response async for response in outbox.responses()]


def outbox(*first_tokens: int) -> Outbox:
    made = Outbox(3, pace_s=lambda: 0.0)
    made.prefill_done(PrefillDone(first_token_id=first_tokens[0], first_token_ids=first_tokens))
    return made


async def test_first_token_is_not_repeated_in_a_chunk() -> None:
    box = outbox(7)
    box.tokens(0, [7], [TokenLogprobs(-1.0)])
    box.tokens(1, [8, 9], [TokenLogprobs(-2.0), TokenLogprobs(-3.0)])
    done, chunk, final = await told(box)
    assert done.prefill_done.first_token_id == 7
    assert list(chunk.chunk.token_ids) == [8, 9]
    assert [one.logprob for one in chunk.chunk.logprobs] == [-2.0, -3.0]
    assert (chunk.chunk.attempt, chunk.chunk.first_index) == (3, 1)
    assert chunk.chunk.generated_tokens == box.num_generated == 3
    assert final.HasField("final")


async def test_choices_are_told_apart_and_each_ends_after_its_tokens() -> None:
    box = outbox(7, 8)
    box.tokens(1, [10, 11], choice=0)
    box.tokens(1, [20], choice=1)
    box.choice_ended(1, STOP)
    box.tokens(3, [12], choice=0)
    box.choice_ended(0, STOP)
    events = (await told(box))[1:-1]
    assert [event.WhichOneof("event") for event in events] == ["chunk", "choice_ended"] * 2
    zero, end_zero, one, end_one = events
    assert (zero.chunk.choice, list(zero.chunk.token_ids)) == (0, [10, 11, 12])
    assert (one.chunk.choice, one.chunk.first_index, list(one.chunk.token_ids)) == (1, 1, [20])
    assert end_zero.choice_ended.generated_tokens == 4
    assert (end_one.choice_ended.choice, end_one.choice_ended.generated_tokens) == (1, 2)
    assert one.chunk.generated_tokens == box.num_generated == 6
    assert box.num_generated_by(1) == 2


async def test_no_message_outgrows_the_limit_however_long_nobody_read() -> None:
    box = outbox(7)
    count = 2 * MAX_MESSAGE_TOKENS + 5
    box.tokens(1, [129_000] * count, [LONGEST] * count)
    events = (await told(box))[1:-1]
    assert [len(event.chunk.token_ids) for event in events] == [MAX_MESSAGE_TOKENS] * 2 + [5]
    assert [event.chunk.first_index for event in events] == [
        1,
        MAX_MESSAGE_TOKENS + 1,
        2 * MAX_MESSAGE_TOKENS + 1,
    ]
    assert all(len(event.chunk.logprobs) == len(event.chunk.token_ids) for event in events)
    assert max(event.ByteSize() for event in events) < INTERNAL_MESSAGE_BYTES // 4


async def test_tokens_within_the_pace_leave_together() -> None:
    box = Outbox(1, pace_s=lambda: 0.5)
    box.prefill_done(PrefillDone(first_token_id=7))
    responses = box.responses()
    assert (await anext(responses)).HasField("prefill_done")
    box.tokens(1, [8])
    assert list((await anext(responses)).chunk.token_ids) == [8]
    reading = asyncio.ensure_future(anext(responses))
    await asyncio.sleep(0)
    box.tokens(2, [9])
    await asyncio.sleep(0.01)
    box.tokens(3, [10])
    assert list((await reading).chunk.token_ids) == [9, 10]
