"""Whatever workers report in whatever order: what is told, counted and billed stays one."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.admission import Admitted
from services.router.finish import Completed, Finish, PrefillSite
from services.router.outbox import ChoiceEnd, Outbox, Piece
from services.router.relay import Relay
from services.router.tally import Ended, Prefilled
from tests.router_harness import write_byte_tokenizer
from tidemill.api.common.v1.logprobs_pb2 import TokenLogprobs
from tidemill.billing import Reuse
from tidemill.text import Tokenizer

MAX_TOKENS = 12
PREFILLED = Prefilled(
    token_ids=(0,),
    prompt_tokens=10,
    computed_tokens=10,
    reused=Reuse(),
    site=PrefillSite(),
    prefill_us=0,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(folder)
    return Tokenizer.load(folder)


def admitted(tokenizer: Tokenizer, n: int, stop: tuple[str, ...], min_tokens: int) -> Admitted:
    """As much of a request as relaying needs."""
    sampling = SimpleNamespace(n=n, max_tokens=MAX_TOKENS, min_tokens=min_tokens)
    model = SimpleNamespace(tokenizer=tokenizer, config=SimpleNamespace(reasoning=True))
    ask = SimpleNamespace(stop=stop)
    parts: Any = SimpleNamespace(sampling=sampling, model=model, ask=ask, token_ids=[5] * 10)
    return cast(Admitted, parts)


letters = st.text(alphabet="ab<think>/", min_size=1, max_size=6)
reports = st.lists(
    st.tuples(st.integers(0, 2), st.one_of(letters, st.sampled_from(list(Finish)[:4]))),
    max_size=24,
)


@settings(max_examples=150, deadline=None)
@given(
    reports=reports,
    stop=st.lists(st.text("ab", min_size=1, max_size=3), max_size=2).map(tuple),
    min_tokens=st.integers(0, 5),
    unseen=st.integers(0, 9),
)
def test_all_tokens_are_told_counted_and_billed_once(
    tokenizer: Tokenizer,
    reports: list[tuple[int, str | Finish]],
    stop: tuple[str, ...],
    min_tokens: int,
    unseen: int,
) -> None:
    outbox = Outbox(max_tokens=4, max_delay_s=0.0, clock=lambda: 0.0)
    relay = Relay(admitted(tokenizer, 3, stop, min_tokens), outbox, max_tokens=4)
    run = relay.tally.begin([choice.counts for choice in relay.choices], worker_id="d")
    relay.tally.prefill(run, PREFILLED)
    sent: list[list[int]] = [[], [], []]
    for index, report in reports:
        choice = relay.choices[index]
        if isinstance(report, Finish):
            relay.end(choice, report)
        elif choice.finish is None or choice.text.stopped:
            ids = [tokenizer.token_bytes.index(letter.encode()) for letter in report]
            sent[index] += ids
            relay.push(choice, ids, [TokenLogprobs(logprob=-each) for each in ids])
    generated = sum(map(len, sent)) + unseen
    relay.tally.end(
        run,
        Ended(
            finish=Finish.LENGTH,
            generated_tokens=generated,
            drafted_tokens=0,
            accepted_tokens=0,
            busy_seconds=0.0,
        ),
    )
    for choice in relay.choices:
        relay.end(choice, Finish.LENGTH)
    outbox.close(cast(Completed, object()))
    check(relay, asyncio.run(all_of(outbox)), sent, generated)


async def all_of(outbox: Outbox) -> list[Any]:
    return [event async for event in outbox.events()]


def check(relay: Relay, events: list[Any], sent: list[list[int]], generated: int) -> None:
    usage = relay.tally.usage()
    assert usage.generated_tokens == generated
    billed = {event.choice: event for event in events if isinstance(event, ChoiceEnd)}
    assert sorted(billed) == [0, 1, 2]
    assert usage.completion_tokens == sum(end.completion_tokens for end in billed.values())
    told = 0
    for index, ids in enumerate(sent):
        own = [each for each in events if isinstance(each, Piece) and each.choice == index]
        relayed = [token_id for piece in own for token_id in piece.token_ids]
        assert relayed == ids[: len(relayed)]
        assert min(len(relayed), MAX_TOKENS) == billed[index].completion_tokens
        assert [one.logprob for piece in own for one in piece.logprobs] == [-id_ for id_ in relayed]
        assert all(len(piece.token_ids) <= 4 for piece in own)
        last = max((at for at, each in enumerate(events) if each in own), default=-1)
        assert events.index(billed[index]) > last
    for event in events:
        if isinstance(event, Piece):
            assert event.told.generated_tokens >= told
            told = event.told.generated_tokens
