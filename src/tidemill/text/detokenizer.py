"""Token ids to text, one token at a time, whole characters only."""

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer as HfTokenizer


class Detokenizer:
    """Incremental decoder of one completion; constant work per byte.

    The parts that `push` and `finish` return add up to what decoding all ids at once gives:
    bytes that are no UTF-8 become U+FFFD, and a character split over tokens is held back until
    its last byte has come. `token_bytes[i]` is what id `i` stands for; ids beyond it stand for
    nothing, as a model may have more rows than its tokeniser has tokens.
    """

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        if token_id >= len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


def byte_table(tokenizer: HfTokenizer) -> list[bytes]:
    """The bytes of every id of a byte-level tokeniser; special tokens and unused ids have none.

    A token is spelt in the 256-letter alphabet of `bytes_to_alphabet`; one with a letter outside
    it (an added token) stands for itself, as in the tokenizers library's ByteLevel decoder.
    """
    alphabet = {letter: byte for byte, letter in bytes_to_alphabet().items()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id in added and added[token_id].special:
            continue
        try:
            table[token_id] = bytes([alphabet[letter] for letter in token])
        except KeyError:
            table[token_id] = token.encode()
    return table


def bytes_to_alphabet() -> dict[int, str]:
    """The printable letter that each byte is written as in a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up in order
    (GPT-2's `bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}
