"""What the router counts of money (Prometheus, tidemill_router_*)."""

from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from tidemill.billing import ledger as rules


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
