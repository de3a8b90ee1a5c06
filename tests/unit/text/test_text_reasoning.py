"""The split into reasoning and answer does not depend on where chunks are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.text import ReasoningSplitter

pieces = st.sampled_from(
    ["<think>", "</think>", "<thi", "nk>", "</", "think", ">", "\n", " ", "a", "<"]
)
texts = st.lists(pieces, max_size=12).map("".join)


def run(chunks: list[str], *, inside: bool = False) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside=inside)
    parts = [*(splitter.push(chunk) for chunk in chunks), splitter.flush()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>why</think>because", "why", "because"),
        ("\n <think>\nwhy\n</think>\n\nbecause", "\nwhy\n", "\n\nbecause"),
        ("no tags at all", "", "no tags at all"),
        ("<think>never closed", "never closed", ""),
        ("<think></think>", "", ""),
        ("text <think>is not reasoning</think>", "", "text <think>is not reasoning</think>"),
        ("<think>a</think>b</think><think>c", "a", "b</think><think>c"),
        ("<think>a</thin</think>b", "a</thin", "b"),
        ("<thinker", "", "<thinker"),
        ("  <thi", "", "  <thi"),
        ("", "", ""),
    ],
)
def test_split_of_a_whole_completion(text: str, reasoning: str, content: str) -> None:
    assert run([text]) == (reasoning, content)
    assert run(list(text)) == (reasoning, content)


def test_a_prompt_that_opened_reasoning_starts_inside_it() -> None:
    assert run(["why</thi", "nk>because"], inside=True) == ("why", "because")
    assert run(["<think>"], inside=True) == ("<think>", "")


@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=6), inside=st.booleans())
def test_chunk_edges_change_nothing(text: str, cuts: list[int], inside: bool) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    chunks = [text[start:end] for start, end in pairwise(edges)]
    assert run(chunks, inside=inside) == run([text], inside=inside)


@given(text=texts)
def test_no_tag_that_was_understood_is_emitted_and_nothing_else_is_lost(text: str) -> None:
    reasoning, content = run(list(text))
    if text.lstrip().startswith("<think>"):
        after = text.lstrip().removeprefix("<think>")
        assert reasoning == after.partition("</think>")[0]
        assert content == after.partition("</think>")[2]
    else:
        assert (reasoning, content) == ("", text)


def test_only_a_possible_tag_is_held_back() -> None:
    splitter = ReasoningSplitter()
    assert splitter.push("<think>ab</").reasoning == "ab"
    assert splitter.push("x").reasoning == "</x"
    assert splitter.inside
    assert splitter.push("</think>c").content == "c"
    assert not splitter.inside
