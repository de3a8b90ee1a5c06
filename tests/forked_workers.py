"""Real workers in processes of their own that start in a moment and can be killed with -9.

They are forked from a server that has imported everything, so a test may kill one a case.
"""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.worker_harness import CERTIFICATES, slow_down, worker_at
from tidemill.rpc.tls import TlsFiles
from tidemill.worker.config import Role

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["tests.worker_harness"])
_START_S = 60.0


class ForkedWorker:
    """One worker over `model_dir`; every step of its engine takes at least `step_s` seconds."""

    def __init__(
        self, worker_id: str, role: Role, model_dir: Path, tls: TlsFiles, *, step_s: float = 0.0
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.address = ""
        self._ready, writer = _FORK.Pipe(duplex=False)
        serving = (step_s, writer, role, model_dir, tls, worker_id)
        self._process = _FORK.Process(target=_serve, args=serving, daemon=True)

    @property
    def endpoint(self) -> str:
        """role@host:port, as the router's configuration wants it."""
        return f"{self.role.value}@{self.address}"

    async def start(self) -> None:
        """Until it serves."""
        self._process.start()
        waiting = asyncio.to_thread(self._ready.poll, _START_S)
        assert await waiting, f"{self.worker_id} does not serve"
        self.address = self._ready.recv()

    def freeze(self) -> None:
        """Let it stand still, its connections open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word, at once."""
        self._signal(signal.SIGKILL)
        self._process.join()

    @property
    def alive(self) -> bool:
        """Whether it has not been killed."""
        return self._process.is_alive()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, number)


def _serve(step_s: float, ready: Connection, *worker: Any) -> None:
    asyncio.run(_run(step_s, ready, *worker))


async def _run(step_s: float, ready: Connection, *worker: Any) -> None:
    role, model_dir, tls, worker_id = worker
    async with worker_at(role, model_dir, lambda _: tls, worker_id=worker_id) as running:
        if step_s:
            slow_down(running, step_s)
        ready.send(running.address)
        await asyncio.Event().wait()


@asynccontextmanager
async def forked(
    model_dir: Path,
    tls: Callable[[str], TlsFiles],
    roles: Sequence[Role],
    **settings: Any,
) -> AsyncIterator[list[ForkedWorker]]:
    """One worker for each role, named by role and number; those that are left are killed."""
    workers = [
        ForkedWorker(f"{role.value}-{number}", role, model_dir, tls(CERTIFICATES[role]), **settings)
        for number, role in enumerate(roles)
    ]
    try:
        await asyncio.gather(*(worker.start() for worker in workers))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
