"""Token ids to text, one token at a time, whole characters only."""

import codecs
from collections.abc import Sequence

from tokenizers import Tokenizer as HfTokenizer

from tidemill.vocabulary import table_of_bytes


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

    def push_all(self, token_ids: Sequence[int]) -> str:
        """As `push` of each in turn, for about the price of one."""
        known, table = len(self._token_bytes), self._token_bytes
        return self._decoder.decode(b"".join([table[each] for each in token_ids if each < known]))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


def byte_table(tokenizer: HfTokenizer) -> list[bytes]:
    """The bytes of every id of a byte-level tokeniser; special tokens and unused ids have none."""
    added = tokenizer.get_added_tokens_decoder()
    special_ids = {token_id for token_id, token in added.items() if token.special}
    return table_of_bytes(tokenizer.get_vocab(with_added_tokens=True), special_ids)
