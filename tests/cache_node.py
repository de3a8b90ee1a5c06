"""Real cache nodes and their clients for tests."""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry

from services.cache.config import CacheConfig
from services.cache.node import CacheNode
from tidemill.kv.cache_client import CacheClient, CacheClientConfig, CacheNamespace, FetchedBlock
from tidemill.rpc.channel import internal_channel
from tidemill.rpc.server import ServerConfig
from tidemill.rpc.tls import TlsFiles

ALICE = CacheNamespace("alice", b"a" * 32, b"L" * 32, "tiny")
BOB = CacheNamespace("bob", b"b" * 32, b"L" * 32, "tiny")

Tls = Callable[[str], TlsFiles]


def chain(*payloads: bytes) -> list[tuple[bytes, bytes]]:
    """Blocks with made-up hashes that differ by payload."""
    return [(hashlib.sha256(b"hash of " + each).digest(), each) for each in payloads]


def hashes(blocks: list[tuple[bytes, bytes]]) -> list[bytes]:
    return [block_hash for block_hash, _ in blocks]


@asynccontextmanager
async def cache_node(tls: Tls, **settings: Any) -> AsyncIterator[CacheNode]:
    """A cache service on a free port, patient with its Redis and its disk unless told otherwise."""
    settings = {"redis_timeout_s": 5.0, "disk_timeout_s": 10.0, **settings}
    server = ServerConfig(address="127.0.0.1:0", tls=tls("cache"), drain_s=0.2)
    registry = CollectorRegistry()
    node = CacheNode(CacheConfig(server=server, **settings), registry=registry)
    await node.start()
    try:
        yield node
    finally:
        await node.close()


@asynccontextmanager
async def cache_client(
    tls: Tls, address: str, *, role: str = "prefill", config: CacheClientConfig | None = None
) -> AsyncIterator[CacheClient]:
    """A worker's client, able to reach other nodes too."""

    def connect(address: str) -> Any:
        return internal_channel(address, role="cache", tls=tls(role))

    # Deadlines made for production would fail a test whenever the machine is busy.
    patient = CacheClientConfig(lookup_s=10, stall_s=10, pause_s=0.2, most_pause_s=1)
    client = CacheClient(connect(address), config or patient, connect=connect)
    try:
        yield client
    finally:
        await client.close()


async def fetch_all(
    client: CacheClient, namespace: CacheNamespace, wanted: list[bytes]
) -> list[FetchedBlock]:
    return [block async for block in client.fetch(namespace, wanted)]
