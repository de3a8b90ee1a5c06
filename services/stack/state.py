"""The directory in which a local stack keeps its secrets, certificates, data and logs."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tidemill.certs import make_dev_certs
from tidemill.errors import ConfigError

SECRETS = ("pepper", "admin.key", "cache-redis", "cache-redis.worker", "cache-redis.router")
_MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it is its owner's alone
SIGNING_KEY = "signing.pem"
LEDGER_SECRET = "ledger-redis"  # noqa: S105 - a file's name


class StateDirectory:
    """`path` and what lies below it; readable by its owner alone.

    `hosts` are further names that the certificates are good for.
    Secrets and certificates are made when they are missing and kept from then on, so that a
    ledger which outlived its processes still opens.
    """

    def __init__(self, path: Path, *, hosts: Sequence[str] = ()) -> None:
        self.path = path
        self.hosts = hosts
        self.certs = path / "certs"
        self.secrets = path / "secrets"
        self.logs = path / "logs"
        self.cache_disk = path / "cache-disk"
        self.spool = path / "spool"
        self.config = path / "tidemill.toml"
        self.lock_fd = -1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the directory to oneself; raises ConfigError if another stack runs in it.

        Child processes inherit the lock, so it outlives a launcher that was killed for as long
        as any of them still runs.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock_fd)
            raise ConfigError(f"a stack is running in {self.path}{self._who()}") from None
        try:
            yield
        finally:
            (self.path / "pids").unlink(missing_ok=True)
            os.close(self.lock_fd)

    @contextmanager
    def shared_memory(self) -> Iterator[Path]:
        """Name a folder in memory for this stack's workers; it goes when the block is left."""
        name = f"tidemill-{os.getuid()}-{sha256(bytes(self.path)).hexdigest()[:16]}"
        folder = _MEMORY / name if os.access(_MEMORY, os.W_OK) else self.path / "shm"
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def prepare(self, *, empty: bool) -> None:
        """Make what is missing; with `empty` forget what the last stack's processes kept."""
        if empty:
            kept = (*self.path.glob("redis-*"), self.cache_disk, self.spool)
            for directory in filter(Path.exists, kept):
                shutil.rmtree(directory)
        for directory in (self.secrets, self.logs):
            directory.mkdir(mode=0o700, exist_ok=True)
        for name in (*SECRETS, LEDGER_SECRET):
            if not (self.secrets / name).exists():
                write_private(self.secrets / name, secrets.token_urlsafe(36))
        if not (self.secrets / SIGNING_KEY).exists():
            write_private(self.secrets / SIGNING_KEY, new_signing_key())
        if not (self.certs / "ca.pem").exists():
            make_dev_certs(self.certs, self.hosts)

    def secret(self, name: str) -> str:
        """The text of one secret."""
        return (self.secrets / name).read_text(encoding="utf-8").strip()

    def note_pids(self, pids: dict[str, int]) -> None:
        """Write down who is running, for whoever finds the directory locked."""
        text = "".join(f"{pid} {name}\n" for name, pid in pids.items())
        write_private(self.path / "pids", text)

    def _who(self) -> str:
        try:
            lines = (self.path / "pids").read_text(encoding="utf-8").splitlines()
        except OSError:
            return ""
        return ": " + ", ".join(lines)


def new_signing_key() -> str:
    """A private key for receipts: Ed25519, PEM."""
    key = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return key.decode()


def write_private(path: Path, text: str) -> None:
    """(Re)write a file that only its owner may read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
