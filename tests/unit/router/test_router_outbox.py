import asyncio
import time
from collections.abc import Callable

from services.router.finish import Finish
from services.router.outbox import (
    Accepted,
    ChoiceEnd,
    Event,
    Moved,
    Outbox,
    Piece,
    PromptScored,
)
from services.router.tally import Told
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.billing import Unbilled
from tidemill.errors import WorkerLost

LONG_S = 60.0  # a delay that no test outlives: what comes all the same came at once


def make(clock: Callable[[], float] = time.monotonic, *, max_delay_s: float = 0.05) -> Outbox:
    return Outbox(max_tokens=8, max_delay_s=max_delay_s, clock=clock)


def piece(index: int, count: int = 1, *, choice: int = 0, generated: int = 0) -> Piece:
    ids = list(range(index, index + count))
    told = generated or index + count
    return Piece(
        choice=choice,
        logprobs=[TokenLogprobs(logprob=-each) for each in ids],
        first_index=index,
        token_ids=ids,
        text="".join(f"{each} " for each in ids),
        reasoning="",
        told=Told(told, 0, told, Unbilled(), 0, 0),
    )


async def drain(outbox: Outbox) -> list[Event]:
    events: list[Event] = []
    try:
        async for event in outbox.events():
            events.append(event)  # noqa: PERF401 - kept though the stream ends by an error
    except WorkerLost:
        return events
    raise AssertionError("the stream ended without its error")


async def test_a_reader_that_is_behind_loses_nothing_and_gets_full_messages() -> None:
    outbox = make()
    for index in range(20):
        outbox.put(piece(index))
    outbox.close(WorkerLost("end"))
    pieces = [each for each in await drain(outbox) if isinstance(each, Piece)]
    assert [len(each.token_ids) for each in pieces] == [8, 8, 4]
    assert [token for each in pieces for token in each.token_ids] == list(range(20))
    assert "".join(each.text for each in pieces) == "".join(f"{each} " for each in range(20))
    assert [each.first_index for each in pieces] == [0, 8, 16]
    assert [each.told.completion_tokens for each in pieces] == [8, 16, 20]


async def test_a_piece_is_never_split() -> None:
    outbox = make()
    outbox.put(piece(0, 5))
    outbox.put(piece(5, 5))
    outbox.close(WorkerLost("end"))
    assert [len(each.token_ids) for each in await drain(outbox) if isinstance(each, Piece)] == [
        5,
        5,
    ]


async def test_a_reader_that_keeps_up_gets_each_piece_at_once() -> None:
    outbox = make(max_delay_s=LONG_S)
    events = outbox.events()
    for index in range(5):
        outbox.put(piece(index))
        async with asyncio.timeout(LONG_S / 2):
            event = await anext(events)
        assert isinstance(event, Piece)
        assert len(event.token_ids) == 1
    await events.aclose()


async def test_a_message_waits_at_most_its_delay_to_fill() -> None:
    outbox = make()
    outbox.put(piece(1))
    outbox.put(piece(2))
    events = outbox.events()
    started = time.monotonic()
    asyncio.get_running_loop().call_later(0.02, outbox.put, piece(3))
    event = await anext(events)
    assert isinstance(event, Piece)
    assert event.token_ids == [1, 2, 3]
    assert time.monotonic() - started > 0.04
    await events.aclose()


async def test_only_the_last_position_is_told_and_none_after_the_first_piece() -> None:
    outbox = make()
    outbox.accept(3)
    outbox.move(2)
    outbox.move(1)
    events = outbox.events()
    assert await anext(events) == Accepted(3)
    assert await anext(events) == Moved(1)
    outbox.move(0)
    outbox.put(piece(0))
    assert isinstance(await anext(events), Piece)
    await events.aclose()


async def test_choices_are_never_merged_and_each_keeps_its_order() -> None:
    outbox = make()
    for index in range(12):
        for choice in range(3):
            outbox.put(piece(index, choice=choice, generated=3 * index + choice + 1))
    outbox.end_choice(ChoiceEnd(1, Finish.STOP, 12))
    outbox.close(WorkerLost("end"))
    events = await drain(outbox)
    pieces = [each for each in events if isinstance(each, Piece)]
    for choice in range(3):
        own = [each for each in pieces if each.choice == choice]
        assert [len(each.token_ids) for each in own] == [8, 4]
        assert [token for each in own for token in each.token_ids] == list(range(12))
    counts = [each.told.generated_tokens for each in pieces]
    assert counts == sorted(counts), "the usage told so far fell"
    assert counts[-1] == 36
    last_of_1 = max(i for i, each in enumerate(events) if getattr(each, "choice", None) == 1)
    assert events[last_of_1] == ChoiceEnd(1, Finish.STOP, 12)


async def test_log_probabilities_stay_with_their_tokens() -> None:
    outbox = make()
    for index in range(20):
        outbox.put(piece(index))
    outbox.close(WorkerLost("end"))
    for each in await drain(outbox):
        assert isinstance(each, Piece)
        assert [-one.logprob for one in each.logprobs] == each.token_ids


async def test_the_prompt_is_scored_before_the_first_piece() -> None:
    outbox = make()
    outbox.accept(0)
    outbox.move(0)
    scored = [PromptScored(1, (7, 8), ()), PromptScored(3, (9,), ())]
    for each in scored:
        outbox.score(each)
    outbox.put(piece(0))
    outbox.close(WorkerLost("end"))
    assert await drain(outbox) == [Accepted(0), *scored, piece(0)]


async def test_a_choice_that_keeps_up_does_not_wait_for_one_that_is_behind() -> None:
    outbox = make(max_delay_s=LONG_S)
    events = outbox.events()
    for index in range(3):
        for choice in range(4):
            outbox.put(piece(index, choice=choice))
        async with asyncio.timeout(LONG_S / 2):
            for _ in range(4):
                assert isinstance(await anext(events), Piece)
    await events.aclose()


async def test_a_first_token_never_waits_for_others_to_fill_its_message() -> None:
    outbox = make(max_delay_s=LONG_S)
    outbox.accept(0)
    outbox.put(piece(0))
    outbox.put(piece(1))
    events = outbox.events()
    async with asyncio.timeout(LONG_S / 2):
        assert await anext(events) == Accepted(0)
        event = await anext(events)
    assert isinstance(event, Piece)
    assert event.token_ids == [0, 1]
    await events.aclose()


async def test_a_reader_that_waited_gets_at_once_what_came_together() -> None:
    outbox = make(max_delay_s=LONG_S)
    events = outbox.events()

    def together() -> None:
        outbox.put(piece(5))
        outbox.put(piece(6))

    asyncio.get_running_loop().call_later(0.01, together)
    async with asyncio.timeout(LONG_S / 2):
        event = await anext(events)
    assert isinstance(event, Piece)
    assert event.token_ids == [5, 6]
    await events.aclose()
