"""tidemill_cache_*: what the cache holds, and how well it serves."""

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from services.cache.store import BlockStore


class CacheMetrics:
    """Counters that the service moves, and gauges read from the store when asked for."""

    def __init__(
        self,
        store: BlockStore,
        redis_up: Callable[[], bool],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tidemill_cache_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, read: Callable[[], float]) -> None:
            Gauge(f"tidemill_cache_{name}", text, registry=registry).set_function(read)

        self.hits = counter("hits", "Blocks that a lookup found.")
        self.misses = counter("misses", "Blocks that a lookup did not find.")
        self.delivered = counter("delivered", "Blocks delivered with a good checksum.")
        self.delivered_bytes = counter("delivered_bytes", "Their payloads.")
        self.failed = counter("failed", "Blocks asked for that could not be delivered.", "cause")
        self.stored = counter("stored", "Blocks stored.")
        self.stored_bytes = counter("stored_bytes", "Their payloads.")
        self.skipped = counter("skipped", "Blocks that were held already or found no room.")
        self.evictions = counter("evictions", "Blocks that had to go for others.")
        gauge("blocks", "Blocks held in memory.", lambda: len(store))
        gauge("bytes", "Payload bytes held in memory.", lambda: store.num_bytes)
        gauge("capacity_bytes", "Most payload bytes in memory.", lambda: store.capacity_bytes)
        gauge("redis_up", "Whether the shared index can be used.", lambda: float(redis_up()))
