"""From token ids to text: exact billed counts whatever is held back."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.errors import InvalidRequest
from tidemill.text import Delta, TextStream, Tokenizer


def spell(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, a token for each byte."""
    of_byte = {value: index for index, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    return [of_byte[bytes([byte])] for byte in text.encode()]


def drain(stream: TextStream, chunks: list[list[int]]) -> tuple[str, str, list[int]]:
    deltas = [*(stream.push(chunk) for chunk in chunks), stream.finish()]
    return (
        "".join(delta.content for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        [token_id for delta in deltas for token_id in delta.token_ids],
    )


def test_plain_tokens_become_text_at_once(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    ids = spell(tokenizer, "hi")
    assert stream.push(ids) == Delta(content="hi", token_ids=tuple(ids))
    assert not stream.finish()
    assert (stream.num_tokens, stream.num_overrun, stream.stopped) == (2, 0, False)


def test_billing_ends_with_the_token_that_completes_the_stop_string(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["END"])
    ids = spell(tokenizer, "abENDxyz")
    delta = stream.push(ids)
    assert (delta.content, delta.token_ids, delta.stopped) == ("ab", tuple(ids[:5]), True)
    assert (stream.num_tokens, stream.num_overrun, stream.stop_string) == (5, 3, "END")
    assert stream.push(ids) == Delta(stopped=True)
    assert stream.num_overrun == 3 + len(ids)
    assert stream.finish() == Delta(stopped=True)


def test_a_stop_string_counts_from_the_least_number_of_tokens_on(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["END"], min_tokens=7)
    content, _, billed = drain(stream, [spell(tokenizer, token) for token in ("ENDaENDbEND", "c")])
    assert (content, len(billed)) == ("ENDa", 7)
    assert stream.stop_string == "END"


def test_a_stop_string_that_was_passed_over_is_no_part_of_the_next(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["aba"], min_tokens=4)
    content, _, billed = drain(stream, [spell(tokenizer, "ababa"), spell(tokenizer, "bax")])
    assert (content, len(billed)) == ("abab", 7)


def test_a_stop_string_that_ends_inside_a_token_bills_the_whole_token(
    tokenizer: Tokenizer,
) -> None:
    ids = tokenizer.encode("a two words</think>")[1:]
    stream = TextStream(tokenizer, ["two wo"])
    content, _, billed = drain(stream, [ids])
    assert content == "a "
    assert billed == ids[:-1]


def test_tokens_of_held_back_text_are_reported_at_once(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["END"])
    held = stream.push(spell(tokenizer, "E"))
    assert (held.content, held.num_tokens) == ("", 1)
    assert stream.push(spell(tokenizer, "x")).content == "Ex"
    assert stream.push(spell(tokenizer, "EN")).content == ""
    assert stream.finish() == Delta(content="EN")
    assert stream.num_tokens == 4


def test_half_a_character_waits_for_its_other_half(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    first, *rest = spell(tokenizer, "潮")
    assert stream.push([first]) == Delta(token_ids=(first,))
    assert stream.push(rest).content == "潮"
    assert stream.push([first]).content == ""
    assert stream.finish().content == "\ufffd"


def test_reasoning_tokens_are_those_up_to_the_end_of_the_closing_tag(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("<think>")[1:], *spell(tokenizer, "why")]
    ids += [*tokenizer.encode("</think>")[1:], *spell(tokenizer, "so")]
    stream = TextStream(tokenizer, reasoning=True)
    assert drain(stream, [[token_id] for token_id in ids]) == ("so", "why", ids)
    assert (stream.num_tokens, stream.num_reasoning_tokens) == (7, 5)


def test_reasoning_tokens_are_exact_where_tags_are_spelt_out(tokenizer: Tokenizer) -> None:
    ids = spell(tokenizer, "<think>why</think>so")
    stream = TextStream(tokenizer, reasoning=True)
    assert drain(stream, [ids])[:2] == ("so", "why")
    assert stream.num_reasoning_tokens == len("<think>why</think>")


def test_a_prompt_that_opened_reasoning_counts_from_the_first_token(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("question<think>\n")
    assert tokenizer.opens_reasoning(prompt)
    stream = TextStream(tokenizer, reasoning=True, inside=tokenizer.opens_reasoning(prompt))
    assert drain(stream, [spell(tokenizer, "why</think>so")])[:2] == ("so", "why")
    assert stream.num_reasoning_tokens == len("why</think>")


def test_unclosed_reasoning_counts_to_the_last_token(tokenizer: Tokenizer) -> None:
    end = min(tokenizer.eos_ids)
    stream = TextStream(tokenizer, ["STOP"], reasoning=True)
    assert drain(stream, [[*spell(tokenizer, "<think>wh ST"), end]])[:2] == ("", "wh ST")
    assert stream.num_reasoning_tokens == stream.num_tokens == len("<think>wh ST") + 1


def test_text_released_in_bulk_behind_the_closing_tag_is_no_reasoning(
    tokenizer: Tokenizer,
) -> None:
    stream = TextStream(tokenizer, ["</think>so what"], reasoning=True)
    ids = spell(tokenizer, "<think>why</think>so be it")
    assert drain(stream, [ids]) == ("so be it", "why", ids)
    assert stream.num_reasoning_tokens == len("<think>why</think>")


def test_a_tag_cut_off_at_the_end_is_text(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, reasoning=True)
    assert drain(stream, [spell(tokenizer, "<think>why</thi")])[:2] == ("", "why</thi")
    undecided = TextStream(tokenizer, reasoning=True)
    assert drain(undecided, [spell(tokenizer, " <thi")])[:2] == (" <thi", "")
    assert undecided.num_reasoning_tokens == 0


def test_tags_are_text_where_reasoning_is_not_asked_for(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer)
    assert drain(stream, [tokenizer.encode("<think>a</think>b")[1:]])[0] == "<think>a</think>b"
    assert stream.num_reasoning_tokens == 0


def test_a_stop_string_counts_within_reasoning_too(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, ["STOP"], reasoning=True)
    assert drain(stream, [spell(tokenizer, "<think>aSTOPb</think>c")])[:2] == ("", "a")
    assert stream.num_reasoning_tokens == stream.num_tokens == len("<think>aSTOP")


@given(st.data())
def test_cuts_between_pushes_change_nothing(tokenizer: Tokenizer, data: st.DataObject) -> None:
    words = st.sampled_from(["<think>", "</think>", "two words", "潮", "a", " ", "EN", "D", "\n"])
    text = data.draw(st.lists(words, max_size=12).map("".join))
    spelt = data.draw(st.booleans())
    ids = spell(tokenizer, text) if spelt else tokenizer.encode(text or "a")[1:]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    edges = [0, *cuts, len(ids)]
    chunks = [ids[start:end] for start, end in pairwise(edges)]
    options = {"reasoning": data.draw(st.booleans()), "inside": data.draw(st.booleans())}
    whole, cut = (TextStream(tokenizer, ["END", "ab"], **options) for _ in range(2))
    assert drain(whole, [ids]) == drain(cut, chunks)
    for name in ("num_tokens", "num_reasoning_tokens", "num_overrun", "stop_string"):
        assert getattr(whole, name) == getattr(cut, name)
    assert whole.num_tokens + whole.num_overrun == len(ids)
    assert whole.num_reasoning_tokens <= whole.num_tokens


@given(st.lists(st.integers(0, 430), max_size=60))
def test_the_reasoning_count_never_falls(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(tokenizer, ["ab"], reasoning=True)
    counts = [0]
    for token_id in [*tokenizer.encode("<think>")[1:], *ids]:
        stream.push([token_id])
        counts.append(stream.num_reasoning_tokens)
    stream.finish()
    counts.append(stream.num_reasoning_tokens)
    assert counts == sorted(counts)


def test_too_many_stop_strings_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="10000 stop strings"):
        TextStream(tokenizer, ["x"] * 10_000)
