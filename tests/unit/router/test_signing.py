"""The router's signing key: read from a file, and older public ones beside it."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.router.money.signing import Signer
from services.stack.state import new_signing_key
from tidemill.billing.signature import signing_key_id
from tidemill.errors import ConfigError


def key_file(folder: Path, text: str) -> Path:
    path = folder / "signing.pem"
    path.write_text(text)
    return path


def public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def test_its_own_key_comes_first_and_the_older_ones_stay_known(tmp_path: Path) -> None:
    older = [Ed25519PrivateKey.generate() for _ in range(2)]
    folder = tmp_path / "older"
    folder.mkdir()
    for number, key in enumerate(older):
        (folder / f"{number}.pem").write_bytes(public_pem(key))
    signer = Signer.load(key_file(tmp_path, new_signing_key()), folder)
    assert list(signer.public_keys) == [
        signer.key_id,
        *(signing_key_id(key.public_key().public_bytes_raw()) for key in older),
    ]
    assert Signer.load(tmp_path / "signing.pem").key_id == signer.key_id


def test_what_is_no_signing_key_is_named(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for text, problem in (("", "cannot be read"), (other.decode(), "no Ed25519 key")):
        with pytest.raises(ConfigError, match=problem):
            Signer.load(key_file(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        Signer.load(tmp_path / "none.pem")
    good = key_file(tmp_path, new_signing_key())
    with pytest.raises(ConfigError, match="no folder"):
        Signer.load(good, tmp_path / "nowhere")
    folder = tmp_path / "older"
    folder.mkdir()
    (folder / "bad.pem").write_text("no key")
    with pytest.raises(ConfigError, match=r"bad\.pem"):
        Signer.load(good, folder)
