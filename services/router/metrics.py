"""What the router counts (Prometheus, tidemill_router_*). Never labelled by tenant or request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from services.router.finish import Completed
from tidemill.billing import BusyPart, Usage

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 1)


class RouterMetrics:
    """All of one router's metrics, in `registry`; `hour_nano` is an accelerator-hour's price."""

    def __init__(
        self, registry: CollectorRegistry = REGISTRY, hour_nano: Mapping[str, int] | None = None
    ) -> None:
        self._registry = registry
        self._hour_nano = hour_nano or {}
        self._requests = Counter(
            "tidemill_router_requests",
            "Requests that ended, by finish reason or error reason.",
            ["model", "finish_reason"],
            registry=registry,
        )
        self._refusals = Counter(
            "tidemill_router_refusals",
            "Requests refused before they had a place, by error reason.",
            ["reason"],
            registry=registry,
        )
        self._ttft = Histogram(
            "tidemill_router_time_to_first_token_seconds",
            "From admission to the first token at the router.",
            ["model"],
            buckets=_TTFT_S,
            registry=registry,
        )
        self._tpot = Histogram(
            "tidemill_router_time_per_output_token_seconds",
            "From the first token to the last, per token after the first of a choice.",
            ["model"],
            buckets=_TPOT_S,
            registry=registry,
        )
        self._prompt = Counter(
            "tidemill_router_prompt_tokens",
            "Prompt tokens by where their KV came from.",
            ["model", "source"],
            registry=registry,
        )
        self._hits = Counter(
            "tidemill_router_billed_hit_tokens",
            "Prompt tokens billed as cache hits.",
            ["model"],
            registry=registry,
        )
        self._completion = Counter(
            "tidemill_router_completion_tokens",
            "Completion tokens billed.",
            ["model"],
            registry=registry,
        )
        self._unbilled = Counter(
            "tidemill_router_unbilled_tokens",
            "Tokens generated that nobody pays for.",
            ["model", "why"],
            registry=registry,
        )
        self._queued = Histogram(
            "tidemill_router_queue_seconds",
            "From admission to the placement that led to the first token.",
            ["model"],
            buckets=_TTFT_S,
            registry=registry,
        )
        self._accelerators = Counter(
            "tidemill_router_accelerator_seconds",
            "Accelerator time that the requests that ended here used, by phase.",
            ["model", "phase"],
            registry=registry,
        )
        self._cost = Counter(
            "tidemill_router_cost_nano",
            "What that time costs by accelerator_hour_nano, in 1e-9 of the currency's unit.",
            ["model", "currency"],
            registry=registry,
        )
        self._revenue = Counter(
            "tidemill_router_revenue_nano",
            "Amounts billed, in 1e-9 of the currency's unit.",
            ["model", "currency"],
            registry=registry,
        )

    def watch(
        self,
        *,
        queued: Callable[[], int],
        queued_tokens: Callable[[], int],
        running: Callable[[], int],
    ) -> None:
        """Show the queue's length and the number of running requests."""
        self._gauge("tidemill_router_queued_requests", "Requests waiting for workers.", queued)
        self._gauge(
            "tidemill_router_queued_prompt_tokens",
            "Uncached prompt tokens of the requests that wait.",
            queued_tokens,
        )
        self._gauge("tidemill_router_running_requests", "Requests let in, not ended.", running)

    def refused(self, reason: str) -> None:
        """A request was refused before it had a place."""
        self._refusals.labels(reason).inc()

    def completed(self, model: str, completed: Completed) -> None:
        """A request was settled."""
        usage, timing = completed.usage, completed.timing
        self._requests.labels(model, completed.finish.name.lower()).inc()
        self._revenue.labels(model, completed.receipt.charge.currency).inc(
            completed.receipt.charge.amount_nano
        )
        self._prompt.labels(model, "computed").inc(usage.computed_tokens)
        for tier, tokens in asdict(usage.reused).items():
            self._prompt.labels(model, tier).inc(tokens)
        self._hits.labels(model).inc(usage.cache_hit_tokens)
        self._completion.labels(model).inc(usage.completion_tokens)
        self._count_unbilled(model, usage)
        if timing.first_token_us:
            self._queued.labels(model).observe(timing.queued_us / 1e6)
            self._ttft.labels(model).observe(timing.first_token_us / 1e6)
        following = usage.completion_tokens / completed.num_choices - 1
        if following > 0 and timing.total_us:
            seconds = (timing.total_us - timing.first_token_us) / 1e6
            self._tpot.labels(model).observe(seconds / following)

    def failed(self, model: str, usage: Usage, reason: str) -> None:
        """A request was written off."""
        self._requests.labels(model, reason.lower()).inc()
        self._count_unbilled(model, usage)

    def used(self, model: str, busy: Sequence[BusyPart]) -> None:
        """What a request that ended, or came to nothing, used of the workers."""
        for part in busy:
            seconds = part.busy_us * part.accelerators / 1e6
            self._accelerators.labels(model, part.phase).inc(seconds)
            for currency, nano in self._hour_nano.items():
                self._cost.labels(model, currency).inc(seconds / 3600 * nano)

    def _gauge(self, name: str, text: str, read: Callable[[], int]) -> None:
        Gauge(name, text, registry=self._registry).set_function(lambda: float(read()))

    def _count_unbilled(self, model: str, usage: Usage) -> None:
        for why, tokens in asdict(usage.unbilled).items():
            self._unbilled.labels(model, why).inc(tokens)
