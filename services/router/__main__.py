"""`python -m services.router --config FILE`: one router process."""

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.router.config import RouterConfig
from services.router.wiring import RouterProcess
from tidemill.config import load
from tidemill.rpc.address import is_loopback
from tidemill.rpc.metrics import serve_metrics
from tidemill.rpc.process import run
from tidemill.rpc.server import ServerConfig


def main() -> int:
    """Parse the command line and run until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m services.router", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file with a section [router]")
    arguments = parser.parse_args()

    async def serve(stop: asyncio.Event) -> None:
        config = load(RouterConfig, "router", arguments.config, os.environ)
        process = RouterProcess(config)
        with serving_metrics(config.server):
            await process.start()
            print(f"router listening on {process.server.address}", flush=True)
            await stop.wait()
            await process.stop()

    return run("router", serve)


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
