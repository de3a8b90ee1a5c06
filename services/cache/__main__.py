"""python -m services.cache [--config FILE]: one node of the context cache."""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

import services.cache.allocator  # noqa: F401 - what it does, it does before the rest starts threads
from services.cache.config import CacheConfig
from services.cache.node import CacheNode
from tidemill.config import load
from tidemill.rpc.process import run

logger = logging.getLogger("services.cache")


def main() -> int:
    """Serve until told to stop; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m services.cache", description=__doc__)
    parser.add_argument("--config", type=Path, help="TOML file with a section [cache]")
    path: Path | None = parser.parse_args().config

    async def serve(stop: asyncio.Event) -> None:
        node = CacheNode(load(CacheConfig, "cache", path, os.environ))
        await node.start()
        logger.info("serving", extra={"address": node.address, "redis_up": node.redis_up})
        await stop.wait()
        await node.close()

    return run("cache", serve)


if __name__ == "__main__":
    sys.exit(main())
