"""How groups of choices share what is paid for."""

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.router.lanes import Lane, share

MOST = 100


def lane(funded: int, going_on: int = 1, ended: int = 0) -> Lane:
    choices: Any = [SimpleNamespace(finish=None)] * going_on
    choices += [SimpleNamespace(finish="stop")] * ended
    ticket: Any = None
    return Lane(choices, ticket, funded)


def test_each_choice_gets_alike() -> None:
    lanes = [lane(0, 3), lane(10), lane(20)]
    assert share(lanes, 100, max_tokens=MOST) == [lanes[2], lanes[1], lanes[0]]
    assert [each.funded_tokens for each in lanes] == [60, 30, 40]


def test_what_one_cannot_use_is_the_others() -> None:
    lanes = [lane(90), lane(10), lane(MOST)]
    assert share(lanes, 100, max_tokens=MOST) == [lanes[0], lanes[1]]
    assert [each.funded_tokens for each in lanes] == [MOST, MOST, MOST]


def test_debts_give_nobody_anything_and_take_nothing() -> None:
    lanes = [lane(90), lane(10)]
    assert share(lanes, -5, max_tokens=MOST) == []
    assert share([], 5, max_tokens=MOST) == []
    assert [each.funded_tokens for each in lanes] == [90, 10]


@given(
    lanes=st.lists(
        st.builds(lane, st.integers(0, MOST), st.integers(1, 4), st.integers(0, 3)), min_size=1
    ),
    spare=st.integers(0, 2000),
)
def test_all_that_can_be_used_is_given_and_no_more(lanes: list[Lane], spare: int) -> None:
    before = [each.funded_tokens for each in lanes]
    room = sum(len(each.choices) * MOST - each.funded_tokens for each in lanes)
    share(lanes, spare, max_tokens=MOST)
    given_out = sum(each.funded_tokens for each in lanes) - sum(before)
    assert given_out == min(spare, room)
    for each, funded in zip(lanes, before, strict=True):
        assert funded <= each.funded_tokens <= len(each.choices) * MOST
