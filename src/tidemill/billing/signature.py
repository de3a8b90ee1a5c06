"""Ed25519 signatures of receipts (DESIGN.md 4: M5); made in the router, checked by anyone.

`cryptography` is imported only where a signature is checked: the base install is without it.
"""

import base64
import binascii
import hashlib
import re
from pathlib import Path

from tidemill.billing.chain import FIRST_CHAIN
from tidemill.errors import ConfigError

PUBLIC_KEY_BYTES = 32
_DOMAIN = b"tidemill.receipt.v2\0"
_KEY_ID_DIGITS = 16
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----")
_PRIVATE_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_SPKI_PREFIX = bytes.fromhex("302a300506032b6570032100")  # RFC 8410: what precedes the 32 bytes


def signed_bytes(content_sha256: str, chain: str = "", position: int = 0) -> bytes:
    """What is signed: of a pending receipt its content alone, later its place in the chain too.

    The hashes are hexadecimal; ValueError if they are not, OverflowError for a position that
    eight bytes do not hold.
    """
    chained = bytes.fromhex(chain or FIRST_CHAIN)
    return _DOMAIN + bytes.fromhex(content_sha256) + chained + position.to_bytes(8, "big")


def signing_key_id(public_key: bytes) -> str:
    """A public key's name: the first 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(public_key).hexdigest()[:_KEY_ID_DIGITS]


def parse_public_key(text: str) -> bytes:
    """The 32 bytes of a key in hexadecimal or PEM (public key); ConfigError if it is neither."""
    if _PRIVATE_PEM.search(text):
        raise ConfigError("this is a private key: keep it secret, and give its public half")
    found = _PEM.search(text)
    try:
        if found is None:
            key = bytes.fromhex(text.strip())
        else:
            encoded = base64.b64decode("".join(found[1].split()), validate=True)
            key = encoded.removeprefix(_SPKI_PREFIX)
    except (ValueError, binascii.Error) as error:
        raise ConfigError(f"no public key, in PEM or 64 hexadecimal digits: {error}") from error
    if len(key) != PUBLIC_KEY_BYTES:
        raise ConfigError(f"no Ed25519 public key: {len(key)} bytes instead of 32")
    return key


def load_public_key(path: Path) -> bytes:
    """The key in a file; ConfigError names the file."""
    try:
        return parse_public_key(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"public key {path} cannot be read: {error}") from error


def is_signed(message: bytes, signature: bytes, public_key: bytes) -> bool:
    """Whether `signature` is the key's over `message`; ConfigError without `cryptography`."""
    try:
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - an extra
        from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"checking a signature needs the package {error.name}: pip install 'tidemill[receipts]'"
        ) from error
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except InvalidSignature:
        return False
    return True
