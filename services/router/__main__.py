"""`python -m services.router --config FILE`: one router process, or several on one port."""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.router.config import RouterConfig
from services.router.processes import Processes, config_of, held_port, stop_with_parent
from tidemill.config import load
from tidemill.rpc.address import is_loopback
from tidemill.rpc.metrics import serve_metrics
from tidemill.rpc.process import run
from tidemill.rpc.server import ServerConfig


def main() -> int:
    """Parse the command line and run until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m services.router", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file with a section [router]")
    parser.add_argument(
        "--processes", type=_positive, default=1, help="how many share the port; default: 1"
    )
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)  # one of them
    arguments = parser.parse_args()
    number: int | None = arguments.process

    async def serve(stop: asyncio.Event) -> None:
        config = load(RouterConfig, "router", arguments.config, os.environ)
        if arguments.processes > 1:
            with held_port(config.server.address) as address:
                processes = Processes(_same(arguments.config), arguments.processes, address, stop)
                await processes.run(started=lambda: _say(address))
        else:
            await _serve(config, number, stop)

    return run("router" if number is None else f"router-{number}", serve)


async def _serve(config: RouterConfig, number: int | None, stop: asyncio.Event) -> None:
    # The parent of several processes needs nothing of this, which takes a while to import.
    from services.router.wiring import RouterProcess  # noqa: PLC0415

    if number is not None:
        config = config_of(config, number)
        stop_with_parent(stop)
    if config.own_cores:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # and of each thread to come
    process = RouterProcess(config, shared_port=number is not None)
    with serving_metrics(config.server):
        await process.start()
        _say(process.server.address)
        await stop.wait()
        await process.stop()


def _say(address: str) -> None:
    print(f"router listening on {address}", flush=True)


def _same(path: Path | None) -> list[str]:
    """The command that runs one of the processes."""
    command = [sys.executable, "-m", "services.router"]
    return command if path is None else [*command, "--config", str(path)]


def _positive(text: str) -> int:
    if (count := int(text)) < 1:
        raise ValueError
    return count


@contextmanager
def serving_metrics(config: ServerConfig) -> Iterator[None]:
    """The metrics port, where one is configured; plain on loopback."""
    address = config.metrics_address
    if address is None:
        yield
        return
    endpoint = serve_metrics(address, tls=None if is_loopback(address) else config.tls)
    try:
        yield
    finally:
        endpoint.close()


if __name__ == "__main__":
    sys.exit(main())
