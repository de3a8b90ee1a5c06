"""The canonical bytes that price books and receipts are hashed over.

UTF-8 JSON with keys sorted by code point, no white space, every character beyond ASCII escaped,
and only objects, lists, strings and integers in it. So the same content gives the same bytes in
every language, and there is no float to disagree about.
"""

import hashlib
import json


def canonical_bytes(value: object) -> bytes:
    """Encode `value`; TypeError if it holds anything but dicts, lists, strings and ints."""
    _require_plain(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sha256_hex(content: bytes) -> str:
    """SHA-256 as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _require_plain(value: object, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{path} has a key that is no string: {key!r}")
            _require_plain(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _require_plain(item, f"{path}[{index}]")
    elif type(value) not in (str, int):
        raise TypeError(f"{path} must be a string or an int, got {type(value).__name__}")
