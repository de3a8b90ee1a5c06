"""A byte-level vocabulary: what each token id stands for, as bytes, and the digest of it all.

The router's tokeniser and a worker's grammars must mean the same by an id: both send, or compare,
the digest that is made here. Standard library and `tidemill.errors` only.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from tidemill.errors import CheckpointError


def vocabulary_digest(token_bytes: Iterable[bytes]) -> bytes:
    """SHA-256 over length (32 bits, little-endian) and bytes of every id in order: 32 bytes."""
    digest = hashlib.sha256()
    for token in token_bytes:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.digest()


def table_of_bytes(vocabulary: Mapping[str, int], special_ids: Collection[int]) -> list[bytes]:
    """The bytes of every id of a byte-level vocabulary; special tokens and unused ids have none.

    A token is spelt in the 256-letter alphabet of `bytes_to_alphabet`; one with a letter outside
    it (an added token) stands for itself, as in the tokenizers library's ByteLevel decoder.
    """
    alphabet = {letter: byte for byte, letter in bytes_to_alphabet().items()}
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id in special_ids:
            continue
        try:
            table[token_id] = bytes([alphabet[letter] for letter in token])
        except KeyError:
            table[token_id] = token.encode()
    return table


def load_token_bytes(model_dir: Path) -> list[bytes]:
    """As `table_of_bytes` from a folder's tokenizer.json, without the tokenizers library.

    Raises CheckpointError.
    """
    path = model_dir / "tokenizer.json"
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if content["decoder"]["type"] != "ByteLevel":
            raise CheckpointError(f"{path}: its decoder is not 'ByteLevel'")
        vocabulary: dict[str, int] = dict(content["model"]["vocab"])
        added = content.get("added_tokens") or []
        vocabulary.update({token["content"]: token["id"] for token in added})
        special_ids = {token["id"] for token in added if token["special"]}
        return table_of_bytes(vocabulary, special_ids)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no byte-level vocabulary: {error!r}") from error


def bytes_to_alphabet() -> dict[int, str]:
    """The printable letter that each byte is written as in a byte-level vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 and up in order
    (GPT-2's `bytes_to_unicode`).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    shifted = {byte: chr(0x100 + index) for index, byte in enumerate(others)}
    return {byte: shifted.get(byte, chr(byte)) for byte in range(256)}
