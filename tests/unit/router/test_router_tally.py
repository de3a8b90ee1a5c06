"""What is billed over any sequence of attempts, and that every generated token is somewhere."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.finish import Finish, PrefillSite
from services.router.tally import Counts, Ended, Prefilled, Run, Tally
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.billing import Reuse


def prefilled(worker_id: str = "p", busy_seconds: float = 0.0) -> Prefilled:
    return Prefilled(
        token_ids=(5,),
        prompt_tokens=130,
        computed_tokens=66,
        reused=Reuse(cache_ram=64),
        site=PrefillSite(worker_id=worker_id),
        prefill_us=1,
        busy_seconds=busy_seconds,
    )


def ended(
    generated: int,
    finish: Finish = Finish.LENGTH,
    *,
    busy_seconds: float = 0.5,
    prefill_busy_seconds: float = 0.0,
) -> Ended:
    return Ended(
        finish=finish,
        generated_tokens=generated,
        drafted_tokens=6,
        accepted_tokens=4,
        busy_seconds=busy_seconds,
        prefill_busy_seconds=prefill_busy_seconds,
        prefill_worker_id="p" if prefill_busy_seconds else "",
    )


def running(*received: int, most: int = 100) -> tuple[Tally, Run]:
    """An attempt whose choices have come so far."""
    tally = Tally([Counts(most) for _ in received])
    run = tally.begin(tally.choices, worker_id="d")
    tally.prefill(run, prefilled())
    for choice, count in zip(tally.choices, received, strict=True):
        choice.received = count
    return tally, run


def test_what_was_generated_is_billed_with_its_prompt() -> None:
    tally, run = running(9)
    tally.choices[0].reasoning = 3
    tally.end(run, ended(9))
    found = tally.usage()
    assert (found.prompt_tokens, found.cache_hit_tokens, found.cache_miss_tokens) == (130, 64, 66)
    assert (found.completion_tokens, found.reasoning_tokens, found.unbilled.total) == (9, 3, 0)
    assert (found.drafted_tokens, found.accepted_tokens) == (6, 4)


def test_tokens_after_the_stop_string_are_overrun() -> None:
    tally, run = running(9)
    tally.choices[0].kept = 7
    tally.choices[0].reasoning = 8
    tally.end(run, ended(12))
    found = tally.usage()
    assert (found.completion_tokens, found.unbilled.overrun) == (7, 5)
    assert found.reasoning_tokens == 7


def test_after_a_cancel_all_tokens_up_to_final_are_billed() -> None:
    tally, run = running(4)
    tally.end(run, ended(11, Finish.CANCELLED))
    assert tally.usage().completion_tokens == 11


def test_without_final_what_the_router_received_is_billed() -> None:
    assert running(4)[0].usage().completion_tokens == 4


def test_never_more_is_billed_than_max_tokens() -> None:
    found = running(9, most=5)[0].usage()
    assert (found.completion_tokens, found.unbilled.overrun) == (5, 4)


def test_without_a_first_token_nothing_is_billed() -> None:
    tally = Tally([Counts(100)])
    tally.end(tally.begin(tally.choices, worker_id="d"), ended(1, Finish.CANCELLED))
    found = tally.usage()
    assert (found.prompt_tokens, found.completion_tokens) == (0, 0)
    assert (found.generated_tokens, found.unbilled.overrun) == (1, 1)


def test_what_a_lost_attempt_relayed_is_billed_once_with_what_the_next_adds() -> None:
    tally, run = running(9)
    tally.lose(run)
    again = tally.begin(tally.choices, worker_id="d")
    tally.prefill(again, prefilled("q"))
    tally.choices[0].received += 3
    tally.end(again, ended(3))
    found = tally.usage()
    assert (found.completion_tokens, found.generated_tokens, found.unbilled.total) == (12, 12, 0)


def test_the_first_split_that_was_read_counts() -> None:
    tally, run = running(1)
    tally.lose(run)
    tally.prefill(tally.begin(tally.choices, worker_id="d"), prefilled("q"))
    assert tally.site.worker_id == "p"
    assert tally.usage().prompt_tokens == 130


def test_tokens_that_only_a_lost_attempts_final_knows_are_redone() -> None:
    tally, run = running(9)
    tally.end(run, ended(11, Finish.SERVER_FAULT))
    tally.lose(run)
    found = tally.usage()
    assert (found.completion_tokens, found.unbilled.failover_redo) == (9, 2)
    assert found.generated_tokens == 11


def test_tokens_that_a_lost_attempt_spoke_of_without_final_are_lost() -> None:
    tally, run = running(9, 4)
    run.report(1, 7)
    tally.lose(run)
    found = tally.usage()
    assert (found.completion_tokens, found.unbilled.lost, found.generated_tokens) == (13, 3, 16)


def test_a_final_that_is_found_late_adds_what_nobody_had_heard_of() -> None:
    tally, run = running(9)
    tally.lose(run)
    again = tally.begin(tally.choices, worker_id="e")
    tally.choices[0].received += 3
    tally.end(again, ended(3))
    tally.recover(run, ended(13, Finish.SERVER_FAULT))
    found = tally.usage()
    assert (found.completion_tokens, found.unbilled.failover_redo) == (12, 4)
    assert (found.generated_tokens, found.drafted_tokens, tally.busy_seconds) == (16, 12, 1.0)


def test_a_final_that_is_found_for_a_cancelled_request_is_billed_like_one_that_was_read() -> None:
    tally, run = running(4)
    tally.recover(run, ended(11, Finish.CANCELLED))
    assert tally.usage().completion_tokens == 11


def test_a_refused_attempt_is_no_attempt() -> None:
    tally = Tally([Counts(100)])
    tally.discard(tally.begin(tally.choices, worker_id="d"))
    assert tally.usage().generated_tokens == 0
    assert tally.busy({}) == []


def test_a_request_that_failed_by_our_fault_costs_nothing() -> None:
    tally, run = running(9)
    tally.end(run, ended(10, Finish.SERVER_FAULT))
    tally.lose(run)
    tally.begin(tally.choices, worker_id="d")
    tally.choices[0].received += 2
    tally.fail()
    found = tally.usage()
    assert (found.prompt_tokens, found.completion_tokens) == (0, 0)
    assert (found.unbilled.server_fault, found.unbilled.lost, found.generated_tokens) == (10, 2, 12)


def test_compute_is_told_by_worker_and_phase_of_every_attempt() -> None:
    tally, run = running(9)
    tally.prefill(run, prefilled("p", busy_seconds=0.25))
    tally.end(run, ended(9, Finish.SERVER_FAULT, prefill_busy_seconds=0.5))
    tally.lose(run)
    tally.prefill(tally.begin(tally.choices, worker_id="e"), prefilled("q", busy_seconds=1.5))
    last = tally.begin(tally.choices, worker_id="f")
    tally.end(last, ended(0, busy_seconds=2.0))
    parts = [
        (part.worker_id, part.phase, part.busy_us, part.accelerators)
        for part in tally.busy({"q": 8})
    ]
    assert parts == [
        ("p", "prefill", 500_000, 1),
        ("d", "decode", 500_000, 1),
        ("q", "prefill", 1_500_000, 8),
        ("f", "decode", 2_000_000, 1),
    ]
    assert tally.busy_seconds == 2.5


def test_choices_add_up_each_with_its_own_end_and_the_prompt_once() -> None:
    tally, run = running(9, 4, 20, most=15)
    tally.choices[0].kept, tally.choices[0].reasoning = 7, 2
    run.report(1, 6)
    tally.choices[1].reasoning = 6
    tally.end(run, ended(40))
    found = tally.usage()
    assert found.prompt_tokens == 130
    assert found.completion_tokens == 7 + 6 + 15
    assert found.reasoning_tokens == 2 + 6
    assert (found.generated_tokens, found.unbilled.overrun) == (40, 40 - 28)


def test_finish_reasons_are_those_of_the_wire() -> None:
    for name, number in lifecycle_pb2.FinishReason.items():
        if number:
            assert Finish(number).name == name.removeprefix("FINISH_REASON_")


@dataclass(frozen=True)
class Went:
    """How one attempt at each choice went.

    `received` by the router, of `max(received, told)` generated; `told` None: no Final came.
    """

    received: int
    told: int | None


went = st.builds(Went, st.integers(0, 9), st.none() | st.integers(0, 14))
MOST = 12


@dataclass
class Model:
    """Each token by itself, as the rules have it: those of one choice, attempt after attempt."""

    relayed: int = 0
    redone: int = 0
    lost: int = 0
    told: int = 0
    unseen: int = 0
    attempts: list[Went] = field(default_factory=list)

    def attempt(self, this: Went, *, last: bool) -> None:
        generated = max(this.received, this.told or 0)
        self.attempts.append(this)
        self.relayed += this.received
        if last:
            self.unseen = generated - this.received
        elif this.told is not None:
            self.redone += generated - this.received
        if this.told is None:
            self.lost += generated
        else:
            self.told += generated


@settings(max_examples=300, deadline=None)
@given(
    first=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    first_told=st.none() | st.integers(0, 30),
    alone=st.lists(st.lists(went, min_size=1, max_size=3), min_size=4, max_size=4),
    kept=st.lists(st.none() | st.integers(0, 20), min_size=4, max_size=4),
    failed=st.booleans(),
)
def test_every_token_of_every_attempt_is_billed_or_unbilled_for_one_reason(
    *,
    first: list[int],
    first_told: int | None,
    alone: list[list[Went]],
    kept: list[int | None],
    failed: bool,
) -> None:
    """M4: one attempt at all choices is lost, then each goes on alone through some more."""
    tally = Tally([Counts(MOST) for _ in first])
    run = tally.begin(tally.choices, worker_id="d")
    tally.prefill(run, prefilled())
    for choice, received in zip(tally.choices, first, strict=True):
        choice.received += received
    if first_told is not None:
        tally.end(run, ended(first_told, Finish.SERVER_FAULT))
    tally.lose(run)
    common = max(sum(first), first_told or 0)
    models = []
    for choice, received, attempts, cut in zip(tally.choices, first, alone, kept, strict=False):
        model = Model(relayed=received)
        models.append(model)
        for number, this in enumerate(attempts):
            last = number == len(attempts) - 1
            run = tally.begin([choice], worker_id="d")
            choice.received += this.received
            if this.told is not None:
                tally.end(run, ended(this.told, Finish.LENGTH if last else Finish.SERVER_FAULT))
            if not last:
                tally.lose(run)
            model.attempt(this, last=last)
        choice.kept = cut
    if failed:
        tally.fail()
    found = tally.usage()
    unbilled = found.unbilled
    generated = common + sum(model.told + model.lost for model in models)
    assert found.generated_tokens == generated == found.completion_tokens + unbilled.total
    if failed:
        lost = sum(model.lost for model in models) + (common if first_told is None else 0)
        assert (found.prompt_tokens, found.completion_tokens, unbilled.overrun) == (0, 0, 0)
        assert (unbilled.lost, unbilled.failover_redo) == (lost, 0)
        return
    billed = [
        min(model.relayed + model.unseen, MOST if cut is None else min(cut, MOST))
        for model, cut in zip(models, kept, strict=False)
    ]
    redone = sum(model.redone for model in models)
    assert found.completion_tokens == sum(billed)
    assert unbilled.failover_redo == redone + (0 if first_told is None else common - sum(first))
    assert (unbilled.lost, unbilled.server_fault) == (0, 0)
