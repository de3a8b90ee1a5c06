"""The router's own signature under its receipts: Ed25519, from a key file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from services.router.finish import Completed
from tidemill.billing.signature import load_public_key, signed_bytes, signing_key_id
from tidemill.errors import ConfigError


class Signer:
    """Signs with one key, and knows the public ones that it or its predecessors signed with.

    Every router of a deployment has the same key: a receipt is signed anew whenever it is read.
    """

    def __init__(self, key: Ed25519PrivateKey, older_public_keys: Sequence[bytes] = ()) -> None:
        self._key = key
        own = key.public_key().public_bytes_raw()
        self.key_id = signing_key_id(own)
        self.public_keys = {signing_key_id(public): public for public in (own, *older_public_keys)}

    @classmethod
    def load(cls, key_file: Path, older_keys_dir: Path | None = None) -> "Signer":
        """From a PEM file (PKCS 8, no password) and a folder of older public keys (*.pem).

        ConfigError names the file that cannot be used.
        """
        try:
            key = load_pem_private_key(key_file.read_bytes(), password=None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"signing key {key_file} cannot be read: {error}") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"signing key {key_file} is no Ed25519 key")
        if older_keys_dir is not None and not older_keys_dir.is_dir():
            raise ConfigError(f"{older_keys_dir} is no folder of public keys")
        older = sorted(older_keys_dir.glob("*.pem")) if older_keys_dir is not None else []
        return cls(key, [load_public_key(path) for path in older])

    def signed(self, completed: Completed) -> Completed:
        """With a signature over the receipt and its place in the chain, as far as it has one."""
        chained, content_sha256 = completed.chained, completed.receipt.content_sha256
        if chained is None:
            message = signed_bytes(content_sha256)
        else:
            message = signed_bytes(content_sha256, chained.chain, chained.position)
        return replace(completed, signature=self._key.sign(message), signing_key_id=self.key_id)
