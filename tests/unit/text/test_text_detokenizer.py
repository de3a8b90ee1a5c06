"""Incremental text equals one-shot text, and never holds half a character."""

import time

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tidemill.text import Detokenizer, Tokenizer
from tidemill.vocabulary import bytes_to_alphabet


def parts_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer.token_bytes)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


def test_alphabet_is_the_librarys() -> None:
    letters = bytes_to_alphabet()
    assert sorted(letters.values()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert (letters[ord("A")], letters[ord(" ")], letters[ord("\n")]) == ("A", "Ġ", "Ċ")


@given(st.data())
def test_any_ids_give_the_librarys_one_shot_text(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    assert "".join(parts_of(tokenizer, ids)) == library.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@given(st.binary(max_size=60))
def test_any_bytes_give_the_librarys_one_shot_text(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, raw: bytes
) -> None:
    of_byte = {value: index for index, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    ids = [of_byte[bytes([byte])] for byte in raw]
    text = "".join(parts_of(tokenizer, ids))
    assert text == library.decode(ids, skip_special_tokens=True)
    assert text == raw.decode("utf-8", errors="replace")


@given(st.text(max_size=40))
def test_whole_text_comes_back_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    of_byte = {value: index for index, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    parts = parts_of(tokenizer, [of_byte[bytes([byte])] for byte in text.encode()])
    assert "".join(parts) == text
    assert [part for part in parts if part] == list(text)


def test_a_character_cut_off_at_the_end_is_one_replacement(tokenizer: Tokenizer) -> None:
    of_byte = {value: index for index, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    ids = [of_byte[bytes([byte])] for byte in "a🌊".encode()[:-1]]
    assert parts_of(tokenizer, ids) == ["a", "", "", "", "\ufffd"]


def test_special_and_unknown_ids_have_no_text(tokenizer: Tokenizer) -> None:
    end = min(tokenizer.eos_ids)
    assert parts_of(tokenizer, [end, tokenizer.vocab_size, tokenizer.vocab_size + 99]) == [""] * 4


def test_added_tokens_stand_for_themselves(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>two words\uff5cwide\uff5c</think>")[1:]
    assert len(ids) == 4
    assert parts_of(tokenizer, ids) == ["<think>", "two words", "\uff5cwide\uff5c", "</think>", ""]


def test_time_grows_with_the_length_and_not_its_square(tokenizer: Tokenizer) -> None:
    """Bytes that are never valid are what makes decoders re-read their whole past."""
    of_byte = {value: index for index, value in enumerate(tokenizer.token_bytes) if len(value) == 1}

    def seconds(count: int) -> float:
        started = time.thread_time()
        parts_of(tokenizer, [of_byte[b"\xff"]] * count)
        return time.thread_time() - started

    seconds(1_000)
    assert seconds(200_000) < 400 * max(min(seconds(2_000) for _ in range(3)), 1e-4)
