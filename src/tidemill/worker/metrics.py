"""tidemill_worker_*: what a worker did, for Prometheus."""

from collections.abc import Callable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from tidemill.worker.engine_thread import Hours

_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)
_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 120)


class WorkerMetrics:
    """The counters of one worker process; gauges are read from `watch`ed functions."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"tidemill_worker_{name}", help_text, labels, registry=registry)

        self.registry = registry
        self.reused_tokens = counter(
            "reused_tokens", "Prompt tokens reused, by the tier they lay in.", "tier"
        )
        self.computed_tokens = counter("computed_tokens", "Prompt tokens computed.")
        self.stopped_tokens = counter(
            "stopped_prefill_tokens", "Prompt tokens computed for prefills that were stopped."
        )
        self.generated_tokens = counter("generated_tokens", "Completion tokens generated.")
        self.finals = counter("finals", "Attempts that ended, by reason.", "reason")
        self.refusals = counter("refusals", "Work refused for want of room, by reason.", "reason")
        self.handovers = counter("handovers", "Hand-overs that ended, by state.", "state")
        self.handover_bytes = counter(
            "handover_bytes", "Latents moved between workers, by direction.", "direction"
        )
        self.pulls = counter("pulls", "Hand-overs pulled whole, by transport.", "transport")
        self.shm_fallbacks = counter(
            "shm_fallbacks", "Pulls by gRPC where shared memory is configured, by cause.", "cause"
        )
        self.pull_retries = counter("pull_retries", "Pulls repeated from the start.")
        self.fetch_failed_blocks = counter(
            "fetch_failed_blocks",
            "Blocks held elsewhere that did not come: missing or damaged, unavailable, or cut.",
            "tier",
            "cause",
        )
        self.fetch_skipped_blocks = counter(
            "fetch_skipped_blocks",
            "Blocks held elsewhere, and computed as the quicker way.",
            "tier",
        )
        self.peer_served_blocks = counter("peer_served_blocks", "Blocks sent to other workers.")
        self.cache_errors = counter(
            "cache_errors",
            "Calls that the cache or a peer did not serve: store, fetch, peer.",
            "call",
        )
        self.cache_stored_blocks = counter("cache_stored_blocks", "Blocks sent to the cache.")
        self.cache_dropped_blocks = counter(
            "cache_dropped_blocks", "Blocks not stored: queue full, evicted, or cache away."
        )
        self.registry_errors = counter("registry_errors", "Heartbeats that Redis did not take.")
        self.prefill_seconds = Histogram(
            "tidemill_worker_prefill_seconds",
            "Computing one prompt, cache fetches included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.decode_step_seconds = Histogram(
            "tidemill_worker_decode_step_seconds",
            "Steps that generated, chunks of prompts in them included.",
            buckets=_STEP_SECONDS,
            registry=registry,
        )

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Show `read()` as gauge tidemill_worker_`name`; called by the metrics thread."""
        Gauge(f"tidemill_worker_{name}", help_text, registry=self.registry).set_function(read)

    def watch_hours(self, read: Callable[[], Hours]) -> None:
        """Show what the time goes into, which adds up to the uptime."""
        self.registry.register(_HoursCollector(read))


class _HoursCollector(Collector):
    def __init__(self, read: Callable[[], Hours]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        hours = self._read()
        busy = CounterMetricFamily(
            "tidemill_worker_busy_seconds",
            "Time of steps, by what they computed.",
            labels=["phase"],
        )
        busy.add_metric(["prefill"], hours.busy.prefill_ns / 1e9)
        busy.add_metric(["decode"], hours.busy.decode_ns / 1e9)
        yield busy
        yield CounterMetricFamily(
            "tidemill_worker_idle_seconds", "Time of no step.", value=hours.idle_ns / 1e9
        )
