"""Mock workers in processes of their own, asked and told through a pipe."""

import asyncio
import multiprocessing
import os
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from tests.mock_worker import MockConfig, MockCounts, MockWorker
from tidemill.rpc.tls import TlsFiles

Tls = Callable[[str], TlsFiles]

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["tests.mock_worker"])
_START_S = 60.0


class MockProcess:
    """Several mock workers in one process, which `kill` ends at once."""

    def __init__(self, tls: Tls, *configs: MockConfig) -> None:
        self.endpoints: list[str] = []
        self._pipe, theirs = _FORK.Pipe()
        files = [tls("worker" if each.role == "both" else each.role) for each in configs]
        self._process = _FORK.Process(target=_serve, args=(theirs, configs, files), daemon=True)

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self._process.pid is not None
        return self._process.pid

    async def start(self) -> None:
        """Until all serve; `endpoints` are theirs, in order."""
        await asyncio.to_thread(self._process.start)
        self.endpoints = await self._answer()

    async def counts(self) -> dict[str, MockCounts]:
        """What each has done, by its id."""
        counts: dict[str, MockCounts] = await self._ask("counts")
        return counts

    async def times(self) -> dict[str, "array[float]"]:
        """When each token was due (time.monotonic), by the request's id among workers."""
        times: dict[str, array[float]] = await self._ask("times")
        return times

    async def change(self, worker_id: str, **fields: Any) -> None:
        """From now on one of them is another, e.g. slower; `draining` is a field too."""
        await self._ask("change", worker_id, fields)

    def kill(self) -> None:
        """End all, without a word."""
        self._process.kill()
        self._process.join()

    async def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return await self._answer()

    async def _answer(self) -> Any:
        assert await asyncio.to_thread(self._pipe.poll, _START_S), "the mock workers do not answer"
        return self._pipe.recv()


def _serve(pipe: Connection, configs: list[MockConfig], files: list[TlsFiles]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(pipe, configs, files))


async def _run(pipe: Connection, configs: list[MockConfig], files: list[TlsFiles]) -> None:
    workers = [MockWorker(config, tls) for config, tls in zip(configs, files, strict=True)]
    pipe.send([await worker.start() for worker in workers])
    while True:
        try:
            question, *about = await asyncio.to_thread(pipe.recv)
        except EOFError:
            os._exit(0)  # whoever started this is gone
        pipe.send(_answer_to(workers, question, *about))


def _answer_to(workers: list[MockWorker], question: str, *about: Any) -> Any:
    if question == "counts":
        return {
            each.config.worker_id: replace(each.counts, running=each.num_running)
            for each in workers
        }
    if question == "times":
        return {key: times for each in workers for key, times in each.times.items()}
    worker_id, fields = about
    for each in workers:
        if each.config.worker_id == worker_id:
            each.draining = fields.pop("draining", each.draining)
            each.config = replace(each.config, **fields)
    return None


@asynccontextmanager
async def mock_workers(tls: Tls, *configs: MockConfig) -> AsyncIterator[list[MockProcess]]:
    """Each in a process of its own; those that are left are killed."""
    processes = [MockProcess(tls, config) for config in configs]
    try:
        await asyncio.gather(*(process.start() for process in processes))
        yield processes
    finally:
        for process in processes:
            process.kill()
