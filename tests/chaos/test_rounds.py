"""Rounds of load with one death each: money is neither lost nor charged twice, nor below zero.

After each round every request has come to its end, the books balance, each answer has one charge,
each receipt is the ledger's, and what the engines generated is what the journal says was billed or
was not, to the token. A decode worker that is killed takes its counter along: in those rounds the
survivors' counters are at most what the journal says, and the rest is at most what requests came to
that the dead one may have worked for.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from random import Random

import pytest

from tests.chaos.audit import (
    Books,
    auditing,
    check_receipts,
    check_statements,
    generated_by,
)
from tests.chaos.customers import (
    LONG,
    QUESTIONS,
    Answers,
    Customers,
    check_outcome,
    check_unnoticed,
)
from tests.chaos.faults import Round, Scene, rounds
from tests.chaos.fleet import (
    CONTEXT_TOKENS,
    IN_PLACE_SETTINGS,
    ROUTERS,
    SETTINGS,
    WORKERS,
    Fleet,
)
from tests.stack_harness import eventually
from tests.tiny_model import make_tiny_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

NUM_CUSTOMERS = 8
SEED = 20250322
LONG_SEED = 20250323


def played(count: int, *, seed: int) -> pytest.MarkDecorator:
    """So many rounds, those with prefill in place last: that is another fleet."""
    ordered = sorted(rounds(count, seed=seed), key=lambda each: each.in_place)
    cases = [pytest.param(each.in_place, each, id=each.name) for each in ordered]
    names = ("shared_fleet", "round_")
    return pytest.mark.parametrize(names, cases, indirect=["shared_fleet"], scope="module")


@pytest.fixture(scope="module")
def shared_fleet(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Decode workers prefill in place if the parameter says so."""
    model = tmp_path_factory.mktemp("tiny")
    make_tiny_checkpoint(model, max_position_embeddings=CONTEXT_TOKENS)
    settings = IN_PLACE_SETTINGS if request.param else SETTINGS
    fleet = Fleet(tmp_path_factory.mktemp("fleet") / "state", model, settings=settings)
    yield fleet
    asyncio.run(fleet.ready())  # what was just started would be ended by a signal
    statuses = fleet.stack.stop()
    assert not any(statuses.values()), statuses


_answers: dict[Fleet, Answers] = {}


@pytest.fixture
async def fleet(shared_fleet: Fleet) -> Fleet:
    """All that runs; what a round leaves dead is the next one's to start."""
    if shared_fleet not in _answers:
        await shared_fleet.ready()
        async with Customers(shared_fleet, "undisturbed") as customers:
            found = {each: await customers.undisturbed(each) for each in (*QUESTIONS, LONG)}
        _answers[shared_fleet] = found
    return shared_fleet


@pytest.fixture
def answers(fleet: Fleet) -> Answers:
    """What each question's answer is when nothing happens."""
    return _answers[fleet]


async def play(fleet: Fleet, answers: Answers, round_: Round) -> None:
    """One round: load, a death, an end for every request, and an audit."""
    fault, rng = round_.fault, Random(round_.tag)
    victim, other = rng.sample(ROUTERS, 2)
    lasting = [name for name in WORKERS if name != fault.kills]
    await fleet.ready()
    if fault.point:
        fleet.arm(victim, fault.armed(rng))
    before = await generated_by(fleet, lasting)
    async with (
        Customers(fleet, round_.tag) as customers,
        auditing(fleet, customers.tenants) as auditor,
    ):
        await eventually(customers.see_all_workers)
        if round_.in_place:
            await customers.ask_all_once(other)
            await eventually(partial(customers.prefills_in_place, other))
        closing = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for name in (f"customer-{index}" for index in range(NUM_CUSTOMERS)):
                own = Random(f"{round_.tag}/{name}")
                group.create_task(customers.shop(own, name, fault.habits, closing))
            await fault.strike(Scene(fleet=fleet, rng=rng, victim=victim, other=other))
            closing.set()
            fleet.revive()
        await auditor.until_quiet(lasting)
        for outcome in customers.outcomes:
            check_outcome(outcome, answers)
            if fault.kills:
                check_unnoticed(outcome)
        books = Books(accounts=await auditor.read())
        books.check()
        check_receipts(books, customers.outcomes)
        await check_statements(books, customers, other)
        assert auditor.looks
    unheard = books.generated_tokens - (await generated_by(fleet, lasting) - before)
    if fault.kills.startswith("decode"):
        assert 0 <= unheard <= books.tokens_touched_by(fleet.worker_id(fault.kills))
    else:
        assert unheard == 0


@played(25, seed=SEED)
async def test_nothing_is_lost_or_charged_twice(
    fleet: Fleet, answers: Answers, round_: Round
) -> None:
    await play(fleet, answers, round_)


@pytest.mark.slow
@played(200, seed=LONG_SEED)
async def test_nothing_is_lost_or_charged_twice_in_200_rounds(
    fleet: Fleet, answers: Answers, round_: Round
) -> None:
    await play(fleet, answers, round_)
