"""`python -m services.router --config FILE`: one router process."""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from services.router.config import RouterConfig
from services.router.wiring import RouterProcess
from tidemill.config import load
from tidemill.rpc.address import is_loopback
from tidemill.rpc.metrics import serve_metrics
from tidemill.rpc.process import run


def main() -> int:
    """Parse the command line and run until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m services.router", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file with a section [router]")
    arguments = parser.parse_args()

    async def serve(stop: asyncio.Event) -> None:
        config = load(RouterConfig, "router", arguments.config, os.environ)
        process = RouterProcess(config)
        await process.start()
        endpoint = None
        address = config.server.metrics_address
        if address is not None:
            tls = None if is_loopback(address) else config.server.tls
            endpoint = serve_metrics(address, tls=tls)
        print(f"router listening on {process.server.address}", flush=True)
        await stop.wait()
        await process.stop()
        if endpoint is not None:
            endpoint.close()

    return run("router", serve)


if __name__ == "__main__":
    sys.exit(main())
