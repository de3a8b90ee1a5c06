"""tidemill_cache_*: what the cache holds, and how well it serves."""

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from services.cache.disk import DiskTier
from services.cache.store import BlockStore


class CacheMetrics:
    """Counters that the service moves, and gauges read from the tiers when asked for."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tidemill_cache_{name}", text, labels, registry=registry)

        self._registry = registry
        self.hits = counter("hits", "Blocks that a lookup found.")
        self.misses = counter("misses", "Blocks that a lookup did not find.")
        self.delivered = counter("delivered", "Blocks delivered with a good checksum.")
        self.delivered_bytes = counter("delivered_bytes", "Their payloads.")
        self.failed = counter("failed", "Blocks asked for that could not be delivered.", "cause")
        self.stored = counter("stored", "Blocks stored.")
        self.stored_bytes = counter("stored_bytes", "Their payloads.")
        self.skipped = counter("skipped", "Blocks that were held already or found no room.")
        self.evictions = counter("evictions", "Blocks that had to go for others.")
        self.promoted = counter("promoted", "Blocks that a hit on disk brought back to memory.")
        self.disk_faults = counter(
            "disk_faults", "Blocks that could not be kept on disk or read back.", "cause"
        )

    def watch(self, store: BlockStore, disk: DiskTier | None, redis_up: Callable[[], bool]) -> None:
        """Show how full the tiers are, and whether what the node depends on works."""
        self._gauge("blocks", "Blocks held in memory.", lambda: len(store))
        self._gauge("bytes", "Payload bytes held in memory.", lambda: store.num_bytes)
        self._gauge("capacity_bytes", "Most payload bytes in memory.", lambda: store.capacity_bytes)
        self._gauge("redis_up", "Whether the shared index can be used.", lambda: float(redis_up()))
        if disk is None:
            return
        self._gauge("disk_up", "Whether the disk serves reads and writes.", lambda: float(disk.up))
        self._gauge("disk_blocks", "Blocks held on disk.", lambda: len(disk))
        self._gauge("disk_bytes", "Payload bytes held on disk.", lambda: disk.num_bytes)
        self._gauge("disk_capacity_bytes", "Most bytes on disk.", lambda: disk.capacity_bytes)
        self._gauge("disk_evicted", "Blocks that had to go from disk.", lambda: disk.num_evicted)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(f"tidemill_cache_{name}", text, registry=self._registry).set_function(read)
