from itertools import pairwise, takewhile
from random import Random

import pytest

from loadtest.arrivals import Arrivals, bursts, diurnal, poisson, replay
from loadtest.prompts import Vocabulary
from loadtest.scenarios import SCENARIOS, Terms, instants, trace_of
from loadtest.traces import look_alike_trace
from tidemill.billing import Prices
from tidemill.client import Message, Model

RUN_S = 2000.0
RATE = 5.0


def arrived(come: Arrivals) -> list[float]:
    return list(takewhile(lambda at_s: at_s < RUN_S, come(RATE, RUN_S, Random(1))))


@pytest.mark.parametrize("come", [poisson, bursts, diurnal])
def test_arrivals_are_in_order_and_of_the_rate_asked_for(come: Arrivals) -> None:
    found = arrived(come)
    assert found == sorted(found)
    assert len(found) / RUN_S == pytest.approx(RATE, rel=0.1)


def test_poisson_gaps_scatter_as_far_as_their_mean() -> None:
    gaps = [later - earlier for earlier, later in pairwise(arrived(poisson))]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.1)


def test_bursts_are_eight_at_an_instant_on_average() -> None:
    found = arrived(bursts)
    assert len(found) / len(set(found)) == pytest.approx(8, rel=0.15)


def test_a_day_is_quiet_at_midnight_and_busy_at_noon() -> None:
    quarters = [0, 0, 0, 0]
    for at_s in arrived(diurnal):
        quarters[int((at_s / RUN_S * 4 + 0.5) % 4)] += 1
    midnight, morning, noon, evening = quarters
    assert midnight < 0.2 * noon
    assert morning == pytest.approx(evening, rel=0.1)


def test_a_trace_is_replayed_in_its_own_rhythm_at_the_rate_asked_for() -> None:
    come = replay([10.0, 10.0, 14.0, 18.0], 0.5)
    assert [next(come) for _ in range(6)] == [0, 0, 4, 8, 8, 8]


def terms(num_context: int = 4096) -> Terms:
    model = Model(
        name="m",
        context_tokens=num_context,
        max_output_tokens=num_context,
        currency="USD",
        prices=Prices(hit=1, miss=1, output=1),
        window="w",
        window_ends_at_ms=None,
        prefill_workers=1,
        decode_workers=1,
    )
    return Terms(
        model=model,
        vocabulary=Vocabulary(1.5),
        scale=0.5,
        shared_tokens=200,
        trace=look_alike_trace(Random(3)),
        rng=Random(2),
    )


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("num_context", [512, 4096])
def test_every_question_of_every_scenario_fits_the_context(name: str, num_context: int) -> None:
    under = terms(num_context)
    asker = SCENARIOS[name].asker(under)
    rng = Random(4)
    for _ in range(200):
        question = asker.ask(rng)
        assert question.max_tokens >= 1
        tokens = under.vocabulary.num_tokens(question.messages) + question.max_tokens
        assert tokens < num_context
        asker.answered(question, "word " * question.max_tokens)


def test_chats_go_on_where_they_were_answered() -> None:
    asker = SCENARIOS["chat"].asker(terms())
    rng = Random(5)
    turns = []
    for _ in range(100):
        question = asker.ask(rng)
        turns.append(len(question.messages))
        asker.answered(question, "an answer")
    assert set(turns) > {2, 4, 6}
    assert question.messages[0].role == "system"


def test_equal_blocks_of_a_trace_are_equal_text() -> None:
    under = terms()
    rows = [row for row in under.trace if len(row.blocks) > 2]
    sharing = next(
        (first, second)
        for first, second in pairwise(sorted(rows, key=lambda row: row.blocks))
        if first.blocks[0] == second.blocks[0]
    )
    first, second = (text_of(under, under.trace.index(row)) for row in sharing)
    common = sum(1 for one, other in zip(first, second, strict=False) if one == other)
    assert common >= 256 / 1.5 - 1  # a block of 512 tokens at scale 0.5


def text_of(under: Terms, index: int) -> list[str]:
    under.rng.seed(7)
    asker = SCENARIOS["replay"].asker(under)
    for _ in range(index):
        asker.ask(Random(0))
    (message,) = asker.ask(Random(index)).messages
    assert isinstance(message, Message)
    return message.content.split()


def test_a_replay_takes_the_trace_s_instants_and_ends_with_the_run() -> None:
    scenario = SCENARIOS["replay"]
    trace = trace_of(scenario, [], Random(6))
    found = list(instants(scenario, trace, 2.0, 50.0, Random(0)))
    assert found[0] == 0
    assert found[-1] < 50
    stretch = found[5] / (trace[5].at_s - trace[0].at_s)
    assert found[20] == pytest.approx((trace[20].at_s - trace[0].at_s) * stretch)
