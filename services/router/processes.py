"""Several router processes behind one port, as one service to whoever runs it.

The kernel deals incoming connections out among the processes; nothing else is shared but the
ledger, the registry and the spool's folder. Each process is started anew, never forked, and ends
when its parent is gone: that holds the other end of its standard input.
"""

import asyncio
import logging
import os
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from services.router.config import RouterConfig
from tidemill.errors import ConfigError, LocalError
from tidemill.rpc.address import split_address

ADDRESS_VARIABLE = "TIDEMILL_ROUTER_SERVER_ADDRESS"
_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_STDIN = 0

logger = logging.getLogger(__name__)


class ProcessFailed(LocalError):
    """A router process ended as it should not; what it said itself stands above."""

    reason = "PROCESS_FAILED"


def config_of(config: RouterConfig, number: int) -> RouterConfig:
    """What process `number` runs with: a name and ports of its own, and the one shared address."""
    server, money = config.server, config.money
    return replace(
        config,
        server=replace(
            server,
            own_address=_shifted(server.own_address, number),
            metrics_address=_shifted(server.metrics_address, number),
        ),
        money=replace(money, router_id=money.router_id and f"{money.router_id}-{number}"),
    )


def _shifted(address: str | None, number: int) -> str | None:
    """The address `number` ports further; a port 0 stays what it is."""
    if address is None:
        return None
    host, separator, _ = address.rpartition(":")
    _, port = split_address(address)
    return f"{host}{separator}{port + number}" if port else address


@contextmanager
def held_port(address: str) -> Iterator[str]:
    """Keep `address` for our processes while they come and go; port 0 becomes a free one.

    Raises ConfigError if anybody has it: other routers that share their port as well, which the
    kernel would let us join.
    """
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as alone, socket.socket(family) as shared:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            alone.bind((host, port))
            port = alone.getsockname()[1]
            alone.close()
            shared.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror or error}") from error
        yield f"{address.rpartition(':')[0]}:{port}"


class Processes:
    """`count` processes of `command`, to which each one's number is added; `run` once.

    A process that ends by itself is started again, after a pause that grows while it fails. SIGHUP
    replaces them one after the other, the next when the last one's successor listens: so all read
    their configuration anew, and one that cannot be started stops with the first.
    """

    def __init__(
        self, command: Sequence[str], count: int, address: str, stop: asyncio.Event
    ) -> None:
        self._command = command
        self._environ = {**os.environ, ADDRESS_VARIABLE: address}
        self._stop = stop
        self._running: dict[int, Process] = {}
        self._listening = [asyncio.Event() for _ in range(count)]
        self._hangup = asyncio.Event()
        self._failed: list[str] = []

    async def run(self, started: Callable[[], None]) -> None:
        """Until told to stop, then until all have drained; `started` is called when all listen.

        Raises ProcessFailed if one cannot even be started the first time, or did not drain.
        """
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self._hangup.set)
        try:
            async with asyncio.TaskGroup() as group:
                stopping = group.create_task(self._pass_on_stop())
                for number, listening in enumerate(self._listening):
                    group.create_task(self._keep(number))
                    if number == 0:  # alone: what is wrong with the configuration is said once
                        await self._either(listening)
                for listening in self._listening:
                    await self._either(listening)
                if not self._stop.is_set():
                    started()
                replacing = group.create_task(self._replace_at_hangup())
                await stopping
                replacing.cancel()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
        if self._failed:
            raise ProcessFailed("; ".join(self._failed))

    async def _either(self, event: asyncio.Event) -> None:
        """Wait for the event or the stop."""
        tasks = [asyncio.ensure_future(each.wait()) for each in (event, self._stop)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _pass_on_stop(self) -> None:
        await self._stop.wait()
        for process in self._running.values():
            process.terminate()

    async def _replace_at_hangup(self) -> None:
        while True:
            await self._hangup.wait()
            self._hangup.clear()
            for number, listening in enumerate(self._listening):
                listening.clear()
                if (process := self._running.get(number)) is not None:
                    process.terminate()
                await listening.wait()
            logger.info("all processes were replaced")

    async def _keep(self, number: int) -> None:
        """Run process `number`, again and again until the stop."""
        pause_s, listened = _PAUSE_S, False
        while not self._stop.is_set():
            status, listens = await self._run_once(number)
            what = f"process {number} ended with status {status}"
            if self._stop.is_set():
                self._failed += [what] if status else []
                return
            listened = listened or listens
            if not listened:
                raise ProcessFailed(what)
            if status:
                logger.error("a process ended", extra={"number": number, "status": status})
                pause_s = _PAUSE_S if listens else min(2 * pause_s, _LONGEST_PAUSE_S)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), pause_s)

    async def _run_once(self, number: int) -> tuple[int, bool]:
        """Its exit status, and whether it came to listen; cancelled: it is killed."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *("--process", str(number)),
            env=self._environ,
            stdin=PIPE,
            stdout=PIPE,
            start_new_session=True,  # Ctrl-C is for us, who pass it on once
        )
        self._running[number] = process
        if self._stop.is_set():
            process.terminate()
        assert process.stdout is not None
        listens = False
        try:
            async for _ in process.stdout:  # it says one line
                listens = True
                self._listening[number].set()
            return await process.wait(), listens
        finally:
            del self._running[number]
            self._listening[number].clear()
            if process.returncode is None:
                process.kill()
                await process.wait()


def stop_with_parent(stop: asyncio.Event) -> None:
    """Set `stop` once the parent is gone."""
    loop = asyncio.get_running_loop()

    def heard() -> None:
        if not os.read(_STDIN, 1):
            loop.remove_reader(_STDIN)
            logger.warning("stopping: the parent process is gone")
            stop.set()

    loop.add_reader(_STDIN, heard)
