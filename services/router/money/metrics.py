"""What the router counts of money (Prometheus, tidemill_router_*)."""

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from tidemill.billing import ledger as rules

_ROUND_TRIP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2)
_LAG_S = (0.005, 0.01, 0.05, 0.1, 0.5, 2, 10, 60, 600, 3600)


class LedgerMetrics:
    """How the ledger answers this router, in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._round_trips = Histogram(
            "tidemill_router_ledger_round_trip_seconds",
            "From sending scripts to the ledger until their effects were on its disk.",
            buckets=_ROUND_TRIP_S,
            registry=registry,
        )
        self._failures = Counter(
            "tidemill_router_ledger_failures",
            "Round trips that the ledger left unanswered.",
            registry=registry,
        )

    def answered(self, seconds: float) -> None:
        """A round trip took so long."""
        self._round_trips.observe(seconds)

    def failed(self) -> None:
        """A round trip brought no answer."""
        self._failures.inc()


class MoneyMetrics:
    """Holds, settlements and what waits, in `registry`."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._holds = Gauge(
            "tidemill_router_holds",
            "Holds that this router answers for: of requests that run, and being resolved.",
            ["state"],
            registry=registry,
        )
        self._settlements = Counter(
            "tidemill_router_settlements",
            "Ends of requests that were handed to the ledger, by what it answered.",
            ["outcome"],
            registry=registry,
        )
        self._lag = Histogram(
            "tidemill_router_settlement_lag_seconds",
            "From the end of a request until its bill was in the ledger.",
            buckets=_LAG_S,
            registry=registry,
        )
        self._depth = Gauge(
            "tidemill_router_spool_depth",
            "Settlements that wait for the ledger.",
            registry=registry,
        )
        self._resolutions = Counter(
            "tidemill_router_resolutions",
            "Requests of vanished routers that were ended, by what was known of them.",
            ["known_from"],
            registry=registry,
        )
        self._refused = Counter(
            "tidemill_router_holds_refused",
            "Requests that no money was held for, by reason.",
            ["reason"],
            registry=registry,
        )

    def watch_spool(self, *, depth: Callable[[], int]) -> None:
        """Show how many settlements wait."""
        self._depth.set_function(lambda: float(depth()))

    def watch_holds(self, state: str, count: Callable[[], int]) -> None:
        """Show how many holds are in a state."""
        self._holds.labels(state).set_function(lambda: float(count()))

    def spooled(self) -> None:
        """A settlement went to the spool."""
        self._settlements.labels("spooled").inc()

    def lagged(self, seconds: float) -> None:
        """A settlement or release reached the ledger so long after the end of its request."""
        self._lag.observe(max(seconds, 0))

    def answered(self, answer: rules.SettleReply | rules.ReleaseReply) -> None:
        """The ledger answered a settlement or release."""
        match answer:
            case rules.Posted(duplicate=duplicate):
                outcome = "repeated" if duplicate else "settled"
            case rules.Released():
                outcome = "released"
            case rules.Stale():
                outcome = "stale"
            case rules.AboveHold():
                outcome = "above_hold"
        self._settlements.labels(outcome).inc()

    def resolved(self, known_from: str) -> None:
        """A vanished router's request was ended: known_from "final", "checkpoint" or "nothing"."""
        self._resolutions.labels(known_from).inc()

    def refused(self, reason: str) -> None:
        """No money was held."""
        self._refused.labels(reason).inc()
