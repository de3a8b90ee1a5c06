"""The index of blocks in Redis, which several nodes of the cache share.

Every node is the only authority on what it holds; the index tells the others. It may lose any
entry at any time: each node announces all it holds when Redis comes back, when its own mark has
vanished, and from time to time.

    tm:b:<32-byte block hash>   packed Entry, with a TTL
    tm:cache:node:<node id>     "<epoch> <address>", with a short TTL: the node lives
    tm:cache:nodes              set of node ids that were ever seen
"""

import struct
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Self, cast

from redis.asyncio import Redis

from services.cache.redis_link import RedisLink

BATCH = 512
HEARTBEAT_S = 1.0
NODE_TTL_S = 10.0

_ENTRY_PREFIX = b"tm:b:"
_NODE_PREFIX = "tm:cache:node:"
_NODES = "tm:cache:nodes"
_FORGET = Path(__file__).with_name("forget.lua").read_text(encoding="utf-8")
_FIXED = struct.Struct("<BBIQ32s")  # version, tier, bytes, stored_at in ms, namespace digest
_EPOCH = struct.Struct("<Q")
_VERSION = 1


@dataclass(frozen=True)
class Node:
    """One life of a cache node. `epoch` rises with every start."""

    node_id: str
    epoch: int

    @property
    def mark(self) -> bytes:
        """What the entries of this life end with."""
        return _EPOCH.pack(self.epoch) + self.node_id.encode()


@dataclass(frozen=True)
class Entry:
    """Where one block lies. `tier` is the number of the proto's CacheTier."""

    namespace: bytes
    num_bytes: int
    tier: int
    stored_at_ms: int
    mark: bytes

    def pack(self) -> bytes:
        """Fixed fields, then the mark of the node that holds the block."""
        fixed = _FIXED.pack(_VERSION, self.tier, self.num_bytes, self.stored_at_ms, self.namespace)
        return fixed + self.mark

    @classmethod
    def unpack(cls, packed: bytes) -> Self | None:
        """The entry, or None for one of another version."""
        if len(packed) <= _FIXED.size or packed[0] != _VERSION:
            return None
        _, tier, num_bytes, stored_at_ms, namespace = _FIXED.unpack_from(packed)
        return cls(namespace, num_bytes, tier, stored_at_ms, packed[_FIXED.size :])


@dataclass(frozen=True)
class Location:
    """A block that another, living node holds."""

    address: str
    tier: int
    num_bytes: int


@dataclass(frozen=True)
class Holding:
    """A block that this node holds."""

    block_hash: bytes
    namespace: bytes
    num_bytes: int
    tier: int


class BlockIndex:
    """This node's part of the index, and its view of the other nodes'.

    Changes are noted at once and sent by `flush`, so no request waits for Redis to be written.
    `address` is the host:port told to the others; set it before the first flush. `peers` maps
    the marks of the other living nodes to their addresses. `held` gives all blocks that this node
    holds.
    """

    def __init__(
        self,
        link: RedisLink,
        node: Node,
        held: Callable[[], Iterable[Holding]],
        *,
        entry_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._node = node
        self._held = held
        self._ttl_ms = round(entry_ttl_s * 1000)
        self._clock = clock
        self.address = ""
        self._pending: dict[bytes, Holding | None] = {}
        self.peers: dict[bytes, str] = {}
        self._beat_at = 0.0
        self._announce_at = 0.0
        self._was_up = False

    def stored(self, holding: Holding) -> None:
        """Note that this node now holds a block, or holds it in another tier."""
        self._pending[holding.block_hash] = holding

    def gone(self, block_hash: bytes) -> None:
        """Note that this node no longer holds a block."""
        self._pending[block_hash] = None

    async def find(self, namespace: bytes, block_hashes: Sequence[bytes]) -> list[Location | None]:
        """Where other living nodes hold these blocks of `namespace`, as far as the index knows."""
        if not self.peers:
            return [None] * len(block_hashes)
        found: list[Location | None] = []
        for start in range(0, len(block_hashes), BATCH):
            batch = block_hashes[start : start + BATCH]
            packed = await self._link.run(partial(_get_all, block_hashes=batch))
            if packed is None:
                break
            found += [self._located(namespace, each) for each in packed]
        return found + [None] * (len(block_hashes) - len(found))

    async def flush(self) -> None:
        """Send what was noted; beat when it is time; announce everything when that is needed."""
        if not self._link.up:
            self._was_up = False
            self._pending.clear()
            return
        now = self._clock()
        came_up, self._was_up = not self._was_up, True
        if came_up or now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_S
            if await self._beat() or came_up or now >= self._announce_at:
                self._announce_at = now + self._ttl_ms / 3000
                self._pending.update((each.block_hash, each) for each in self._held())
        while self._pending and self._link.up:
            batch = dict(islice(self._pending.items(), BATCH))
            for block_hash in batch:
                del self._pending[block_hash]
            await self._link.run(partial(self._send, batch=batch))

    async def leave(self) -> None:
        """Tell the others that this node is going: its entries count for nothing from now on."""
        await self._link.run(lambda redis: redis.delete(_NODE_PREFIX + self._node.node_id))

    def _located(self, namespace: bytes, packed: bytes | None) -> Location | None:
        entry = None if packed is None else Entry.unpack(packed)
        if entry is None or entry.namespace != namespace:
            return None
        address = self.peers.get(entry.mark)
        return None if address is None else Location(address, entry.tier, entry.num_bytes)

    async def _beat(self) -> bool:
        """Renew this node's mark and learn the others'. True if our mark had vanished."""
        answer = await self._link.run(self._beat_on)
        if answer is None:
            return False
        vanished, self.peers = answer
        return vanished

    async def _beat_on(self, redis: Redis) -> tuple[bool, dict[bytes, str]]:
        node = self._node
        pipeline = redis.pipeline(transaction=False)
        pipeline.set(
            _NODE_PREFIX + node.node_id,
            f"{node.epoch} {self.address}",
            px=round(NODE_TTL_S * 1000),
            get=True,
        )
        pipeline.sadd(_NODES, node.node_id)
        pipeline.smembers(_NODES)
        before, _, members = await pipeline.execute()
        others = sorted({member.decode() for member in members} - {node.node_id})
        return before is None, await self._peers_on(redis, others)

    async def _peers_on(self, redis: Redis, node_ids: list[str]) -> dict[bytes, str]:
        peers: dict[bytes, str] = {}
        keys = [_NODE_PREFIX + each for each in node_ids]
        values = cast(list[bytes | None], await redis.mget(keys) if keys else [])
        dead = [each for each, value in zip(node_ids, values, strict=True) if value is None]
        if dead:
            await redis.srem(_NODES, *dead)
        for node_id, value in zip(node_ids, values, strict=True):
            if value is not None:
                epoch, _, address = value.decode().partition(" ")
                peers[Node(node_id, int(epoch)).mark] = address
        return peers

    async def _send(self, redis: Redis, batch: dict[bytes, Holding | None]) -> None:
        pipeline = redis.pipeline(transaction=False)
        now_ms = time.time_ns() // 1_000_000
        for block_hash, change in batch.items():
            key = _ENTRY_PREFIX + block_hash
            if change is None:
                pipeline.eval(_FORGET, 1, key, self._node.mark)
            else:
                entry = Entry(
                    change.namespace, change.num_bytes, change.tier, now_ms, self._node.mark
                )
                pipeline.set(key, entry.pack(), px=self._ttl_ms)
        await pipeline.execute()


async def _get_all(redis: Redis, block_hashes: Sequence[bytes]) -> list[bytes | None]:
    pipeline = redis.pipeline(transaction=False)
    for block_hash in block_hashes:
        pipeline.get(_ENTRY_PREFIX + block_hash)
    values: list[bytes | None] = await pipeline.execute()
    return values
