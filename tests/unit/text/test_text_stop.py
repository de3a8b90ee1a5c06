"""Stop strings: found at the earliest end, and no part of one is ever emitted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.errors import InvalidRequest
from tidemill.text import StopMatcher

small_text = st.text(alphabet="ab", max_size=30)
stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


def run(stops: list[str], chunks: list[str]) -> tuple[str, str | None, list[str]]:
    matcher = StopMatcher(stops)
    emitted = []
    for chunk in chunks:
        emitted.append(matcher.push(chunk))
        if matcher.matched is not None:
            return "".join(emitted), matcher.matched, emitted
    return "".join([*emitted, matcher.flush()]), None, emitted


def by_definition(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_text_without_stop_strings_passes_through() -> None:
    assert run([], ["any ", "text"]) == ("any text", None, ["any ", "text"])


def test_a_possible_beginning_is_held_back_and_released() -> None:
    matcher = StopMatcher(["\n\nHuman:"])
    assert matcher.push("Yes.\n") == "Yes."
    assert matcher.push("\nHum") == ""
    assert matcher.push("ble") == "\n\nHumble"
    assert matcher.matched is None


def test_only_as_much_as_could_be_a_beginning_is_held_back() -> None:
    matcher = StopMatcher(["aab"])
    assert [matcher.push(letter) for letter in "aaaa"] == ["", "", "a", "a"]
    assert matcher.push("b") == ""
    assert matcher.matched == "aab"


def test_a_match_over_chunk_edges_cuts_the_text_before_it() -> None:
    assert run(["STOP"], ["go S", "TO", "P on"])[:2] == ("go ", "STOP")


def test_the_first_string_to_be_complete_wins_and_the_longest_of_equals() -> None:
    assert run(["xyz", "y"], ["axyz"])[:2] == ("ax", "y")
    assert run(["z", "yz", "q"], ["xyz"])[:2] == ("x", "yz")


@given(stops=stop_lists, chunks=st.lists(small_text, max_size=8))
def test_any_chunking_gives_what_the_definition_says(stops: list[str], chunks: list[str]) -> None:
    emitted, matched, _ = run(stops, chunks)
    assert (emitted, matched) == by_definition(stops, "".join(chunks))


@given(stops=stop_lists, text=small_text)
def test_what_is_held_back_is_always_a_beginning_of_a_stop_string(
    stops: list[str], text: str
) -> None:
    matcher = StopMatcher(stops)
    num_emitted = 0
    for count, letter in enumerate(text, start=1):
        num_emitted += len(matcher.push(letter))
        if matcher.matched is not None:
            return
        held = text[num_emitted:count]
        assert held == "" or any(stop.startswith(held) for stop in stops)
        possible = [
            n for n in range(1, count + 1) for s in stops if s.startswith(text[count - n : count])
        ]
        assert len(held) == max(possible, default=0)


@pytest.mark.parametrize(
    ("stops", "field"),
    [
        (["x"] * 17, "stop"),
        (["x"] * 10_000, "stop"),
        (["a", ""], "stop[1]"),
        (["a" * 257], "stop[0]"),
    ],
)
def test_stop_strings_out_of_bounds_are_refused(stops: list[str], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        StopMatcher(stops)
    assert [name for name, _ in caught.value.violations] == [field]


def test_sixteen_long_stop_strings_are_allowed() -> None:
    assert run(["a" * (241 + n) for n in range(16)], ["a" * 300])[:2] == ("", "a" * 241)
