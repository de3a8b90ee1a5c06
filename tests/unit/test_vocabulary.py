import hashlib
import json
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_checkpoint
from tidemill.errors import CheckpointError
from tidemill.text import Tokenizer
from tidemill.vocabulary import load_token_bytes, vocabulary_digest

DEMO = Path(__file__).parents[2] / "models" / "demo"


def test_worker_reads_the_bytes_that_the_routers_tokenizer_has(tmp_path: Path) -> None:
    tiny = make_tiny_checkpoint(tmp_path)
    for folder in (DEMO, tiny):
        assert load_token_bytes(folder) == list(Tokenizer.load(folder).token_bytes)


def test_digest_covers_length_and_bytes_of_every_id_in_order() -> None:
    by_hand = b"\x02\0\0\0ab" + b"\0\0\0\0" + b"\x01\0\0\0c"
    assert vocabulary_digest([b"ab", b"", b"c"]) == hashlib.sha256(by_hand).digest()
    assert vocabulary_digest([b"a", b"", b"bc"]) != vocabulary_digest([b"ab", b"", b"c"])


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        json.dumps({"decoder": None, "model": {"vocab": {}}}),
        json.dumps({"decoder": {"type": "WordPiece"}, "model": {"vocab": {}}}),
        json.dumps({"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": "b"}}}),
    ],
)
def test_a_file_that_is_no_byte_level_vocabulary_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_token_bytes(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_token_bytes(tmp_path)
