"""The ledger's Redis as a router demands it, for benchmarks."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.router.money.ledger import REQUIRED_SETTINGS
from services.stack.ports import free_port
from tests.redis_process import RedisProcess


@contextmanager
def ledger_redis() -> Iterator[tuple[Path, RedisProcess]]:
    """A running server, and the folder it lies in, which is good for more; both go in the end."""
    settings = {name.replace("-", "_"): value for name, value in REQUIRED_SETTINGS.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = RedisProcess(folder, port=free_port(), settings=settings)
        server.start()
        try:
            yield folder, server
        finally:
            server.stop()
