"""What the cache service can be told."""

import uuid
from dataclasses import dataclass, field
from pathlib import Path

from tidemill.rpc.server import ServerConfig


@dataclass(frozen=True)
class CacheConfig:
    """Section [cache].

    `redis_url` is the cache's own Redis (never the ledger's), credentials included: give it by
    TIDEMILL_CACHE_REDIS_URL_FILE where the file is not private. Unset: no shared index, only
    this node's memory. `node_id` names this node across restarts and `advertise` is the
    host:port under which clients reach it (unset: the address bound). `capacity_bytes` bounds
    the payloads held, `staging_bytes` those on their way in. `entry_ttl_s` is how long an index
    entry outlives its last announcement, `redis_timeout_s` the longest wait for one answer.
    `disk_path` is a folder of this node's own, in which blocks that memory lets go may take
    `disk_capacity_bytes`; both unset: no disk tier. A file not read within `disk_timeout_s` is not
    waited for.
    """

    server: ServerConfig = field(default_factory=ServerConfig)
    redis_url: str | None = None
    redis_timeout_s: float = 0.1
    node_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    advertise: str | None = None
    capacity_bytes: int = 1 << 30
    max_block_bytes: int = 64 << 20
    staging_bytes: int = 256 << 20
    entry_ttl_s: float = 3600.0
    disk_path: Path | None = None
    disk_capacity_bytes: int | None = None
    disk_timeout_s: float = 0.4

    def __post_init__(self) -> None:
        if not 1 <= len(self.node_id.encode()) <= 64:
            raise ValueError("node_id must be 1 to 64 bytes")
        if self.max_block_bytes > 1 << 28:
            raise ValueError("max_block_bytes must be at most 268435456")
        if (self.disk_path is None) != (self.disk_capacity_bytes is None):
            raise ValueError("disk_path and disk_capacity_bytes must be set together")
        for name in ("capacity_bytes", "max_block_bytes", "staging_bytes", "disk_capacity_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("redis_timeout_s", "entry_ttl_s", "disk_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
