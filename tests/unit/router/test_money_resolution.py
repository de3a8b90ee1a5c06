from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.finish import Finish, PrefillSite
from services.router.money.resolution import (
    AttemptEnd,
    Split,
    decisive,
    resolve,
    with_former_ends,
)
from services.router.money.terms import Progress, Terms
from tidemill.billing import Reuse, Unbilled, Usage

SITE = PrefillSite(worker_id="p1")
SPLIT = Split(prompt_tokens=100, computed_tokens=36, reused=Reuse(device=64), site=SITE)
TERMS = Terms(
    key_id="k",
    model="tiny",
    price_model="m",
    currency="USD",
    book_digest="0" * 64,
    wire_id="acme:r",
    seed=7,
    choices=1,
    prompt_tokens=100,
    max_tokens=1000,
    cap_nano=None,
    deadline_ms=10_000,
)


def progress(completion: int, *, attempts: int = 1, fence: int = 1, **fields: int) -> Progress:
    usage = Usage(
        prompt_tokens=100,
        computed_tokens=36,
        reused=Reuse(device=64),
        completion_tokens=completion,
        generated_tokens=completion,
    )
    running = {attempts: fields.get("of_it", completion)}
    made = Progress(usage=usage, site=SITE, attempts=attempts, running=running)
    return made.under(fence, None)


def end(generated: int, *, attempt: int = 1, relayed: int = 0, fence: int = 1) -> AttemptEnd:
    return AttemptEnd(
        fence=fence,
        attempt=attempt,
        finish=Finish.CANCELLED,
        generated_tokens=generated,
        relayed_tokens=relayed,
        split=SPLIT if not relayed else replace(SPLIT, prompt_tokens=100 + relayed),
    )


def test_the_final_of_the_attempt_that_ran_says_what_is_billed() -> None:
    found = resolve(TERMS, progress(10), [end(50)], funded_tokens=1000)
    assert found.usage.completion_tokens == found.usage.generated_tokens == 50
    assert (found.usage.cache_hit_tokens, found.usage.unbilled) == (64, Unbilled())
    assert (found.finish, found.site, found.known_from) == (Finish.CANCELLED, SITE, "final")


def test_without_a_checkpoint_the_final_alone_does() -> None:
    found = resolve(TERMS, None, [end(50)], funded_tokens=1000)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (100, 50)
    assert found.usage.reused == SPLIT.reused


def test_without_a_final_the_checkpoint_is_billed() -> None:
    found = resolve(TERMS, progress(10), [], funded_tokens=1000)
    assert (found.usage.completion_tokens, found.known_from) == (10, "checkpoint")
    assert found.finish is Finish.SERVER_FAULT


def test_with_neither_nothing_is_billed() -> None:
    found = resolve(TERMS, None, [], funded_tokens=1000)
    assert (found.usage, found.known_from) == (Usage(), "nothing")


def test_what_lies_beyond_the_funds_or_max_tokens_is_overrun() -> None:
    found = resolve(TERMS, progress(10), [end(50)], funded_tokens=20)
    assert found.usage.completion_tokens == 20
    assert found.usage.unbilled == Unbilled(overrun=30)
    most = resolve(TERMS, progress(10), [end(1200)], funded_tokens=5000)
    assert (most.usage.completion_tokens, most.usage.unbilled.overrun) == (1000, 200)


def test_an_attempt_after_a_failover_counts_from_what_was_relayed_before_it() -> None:
    known = progress(40, attempts=2, of_it=5)
    found = resolve(TERMS, known, [end(25, attempt=2, relayed=35)], funded_tokens=1000)
    assert found.usage.completion_tokens == 60
    assert found.usage.reused == SPLIT.reused, "U2: the first split counts"
    assert found.attempts == 2


def test_the_final_of_an_earlier_attempt_adds_nothing_to_the_checkpoint_of_a_later_one() -> None:
    known = progress(40, attempts=2, of_it=5)
    found = resolve(TERMS, known, [end(35)], funded_tokens=1000)
    assert (found.usage.completion_tokens, found.known_from) == (40, "checkpoint")


def test_a_stream_that_a_later_owner_began_anew_is_billed_by_its_own_final() -> None:
    ends = [end(120), end(30, attempt=2, fence=2)]
    found = resolve(TERMS, progress(100), ends, funded_tokens=1000)
    assert found.usage.completion_tokens == 30
    assert (found.usage.generated_tokens, found.usage.unbilled.lost) == (150, 120)


def test_choices_that_went_on_apart_are_added_up() -> None:
    known = replace(progress(60, attempts=3), running={2: 20, 3: 10}).under(1, None)
    ends = [end(25, attempt=2, relayed=15), end(30, attempt=3, relayed=15)]
    found = resolve(replace(TERMS, choices=2), known, ends, funded_tokens=5000)
    assert found.usage.completion_tokens == 60 + 5 + 20


def test_nothing_is_billed_of_a_prompt_whose_split_nobody_knows() -> None:
    found = resolve(TERMS, None, [end(20, attempt=2, relayed=10)], funded_tokens=1000)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (0, 0)
    assert found.usage.unbilled.lost == 20


@pytest.mark.parametrize(
    ("known", "ends", "expected"),
    [
        (None, [], False),
        (None, [end(5)], True),
        (progress(1), [], False),
        (progress(1), [end(5)], True),
        (progress(1, attempts=2), [end(5)], False),
    ],
)
def test_waiting_ends_once_every_running_attempt_is_heard_of(
    known: Progress | None, ends: list[AttemptEnd], expected: bool
) -> None:
    assert decisive(known, ends) is expected


counts = st.integers(0, 2000)


ends_of_any_kind = st.builds(
    end,
    counts,
    attempt=st.integers(1, 4),
    relayed=counts,
    fence=st.integers(1, 2),
)


@given(counts, st.integers(1, 3), ends_of_any_kind, counts)
def test_every_token_is_in_a_class_and_none_is_billed_beyond_the_funds(
    completion: int, attempts: int, last: AttemptEnd, funded: int
) -> None:
    of_it = min(completion, 7)
    known = progress(completion, attempts=attempts, of_it=of_it)
    found = resolve(TERMS, known, [last], funded_tokens=funded)
    assert found.usage.completion_tokens <= min(funded, 1000)
    assert found.usage.generated_tokens >= completion - of_it


def test_a_later_owner_counts_what_older_fences_generated_beyond_their_checkpoints() -> None:
    mine = Usage(completion_tokens=7, generated_tokens=7, prompt_tokens=1, computed_tokens=1)
    first = progress(20)
    second = progress(5, attempts=2, fence=2).under(2, first)
    heard = [
        end(52),  # beyond the 20 of the first checkpoint
        end(6, attempt=2, fence=2),  # beyond the 5 of the second
        end(4, attempt=3, fence=2),  # begun after it
    ]
    whole = with_former_ends(mine, second, heard)
    assert whole.unbilled.failover_redo == 32 + 1 + 4
    assert whole.completion_tokens == 7
    ended = replace(first, running={}).under(1, None)
    assert with_former_ends(mine, ended, [end(52)]) == mine, "its Final had been read"
    assert with_former_ends(mine, None, [end(52)]).unbilled.failover_redo == 52


def test_terms_and_progress_come_back_as_they_were() -> None:
    assert Terms.decode(TERMS.encode()) == TERMS
    known = progress(40, attempts=2, of_it=5).under(2, progress(3))
    assert Progress.decode(known.encode()) == known
    assert known.owners.keys() == {1, 2}
