"""Child processes: started together, watched, and stopped in reverse order by their pid."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tidemill.errors import LocalError

POLL_S = 0.25
SAY_AGAIN_S = 5.0
GRACE_S = 15.0
LOG_LINES = 15


class ChildFailed(LocalError):
    """A child process ended, or never became ready; the message holds the end of its log."""

    reason = "CHILD_FAILED"


@dataclass(frozen=True)
class Child:
    """A process to start. `ready` asks it once whether it serves."""

    name: str
    command: tuple[str, ...]
    ready: Callable[[], Awaitable[bool]]


@dataclass
class _Running:
    child: Child
    process: asyncio.subprocess.Process
    started: float
    log: Path


class Supervisor:
    """Runs children for as long as its `async with` block lasts.

    `say` gets one line of progress at a time, `started` the ids of all processes by name whenever
    some were started. `inherited` are file descriptors that children keep open.
    """

    def __init__(
        self,
        logs: Path,
        *,
        directory: Path,
        environ: dict[str, str],
        say: Callable[[str], None],
        started: Callable[[dict[str, int]], None],
        inherited: Sequence[int] = (),
    ) -> None:
        self._logs = logs
        self._directory = directory
        self._environ = environ
        self._say = say
        self._started = started
        self._inherited = tuple(inherited)
        self._running: list[_Running] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stop()

    async def start(self, children: Sequence[Child], *, timeout_s: float) -> None:
        """Start all, then wait until each is ready; a line for each tells how long it took.

        Raises ChildFailed as soon as one of them ends, or after `timeout_s`.
        """
        started = [await self._spawn(child) for child in children]
        self._started({each.child.name: each.process.pid for each in self._running})
        waiting = {asyncio.create_task(self._until_ready(each)) for each in started}
        deadline = time.monotonic() + timeout_s
        try:
            while waiting:
                patience = min(SAY_AGAIN_S, max(deadline - time.monotonic(), 0))
                done, waiting = await asyncio.wait(
                    waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    name, seconds = task.result()
                    self._say(f"  {name:<14} ready after {seconds:5.1f} s")
                    started = [each for each in started if each.child.name != name]
                late = [each.child.name for each in started]
                if waiting and time.monotonic() >= deadline:
                    raise ChildFailed(
                        f"not ready after {timeout_s:g} s: {', '.join(late)}\n"
                        + _tail(started[0].log)
                    )
                if not done:
                    self._say(f"  waiting for {', '.join(late)}")
        finally:
            for task in waiting:
                task.cancel()

    async def watch(self) -> None:
        """Wait until any child ends, which none should: raises ChildFailed."""
        while True:
            for each in self._running:
                _check_alive(each)
            await asyncio.sleep(POLL_S)

    async def _spawn(self, child: Child) -> _Running:
        log = self._logs / f"{child.name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *child.command,
                cwd=self._directory,
                env=self._environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=self._inherited,
                start_new_session=True,  # Ctrl-C is for us: children are stopped in order
            )
        running = _Running(child, process, time.monotonic(), log)
        self._running.append(running)
        return running

    async def _until_ready(self, running: _Running) -> tuple[str, float]:
        while not await running.child.ready():
            _check_alive(running)
            await asyncio.sleep(POLL_S)
        _check_alive(running)
        return running.child.name, time.monotonic() - running.started

    async def _stop(self) -> None:
        """SIGTERM in reverse order, SIGKILL for what outlasts the grace."""
        began = time.monotonic()
        try:
            for each in reversed(self._running):
                if each.process.returncode is None:
                    each.process.terminate()
                    await self._reap(each, GRACE_S)
        finally:
            for each in self._running:
                if each.process.returncode is None:
                    each.process.kill()
        for each in self._running:
            await each.process.wait()
        self._say(f"stopped after {time.monotonic() - began:.1f} s")

    async def _reap(self, running: _Running, grace_s: float) -> None:
        try:
            await asyncio.wait_for(running.process.wait(), grace_s)
        except TimeoutError:
            self._say(f"  {running.child.name} did not stop within {grace_s:g} s: killed")
            running.process.kill()


def _check_alive(running: _Running) -> None:
    status = running.process.returncode
    if status is not None:
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        raise ChildFailed(f"{running.child.name} ended {how}\n{_tail(running.log)}")


def _tail(log: Path) -> str:
    """The last lines of a log, indented."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join([f"the end of {log}:", *(f"  | {line}" for line in lines)])
