"""What a client of either stack keeps beside its channel."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

from tidemill.client.calls import Call
from tidemill.client.exchange import Exchange
from tidemill.client.request import Prepared
from tidemill.client.retry import Attempts, RetryPolicy
from tidemill.client.settings import Settings

_UNARY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Session:
    """Whom to call, and how often to try."""

    settings: Settings
    retry: RetryPolicy
    rng: Random = field(default_factory=Random)

    def exchange(self, prepared: Prepared) -> Exchange:
        """A generation about to start."""
        return Exchange(prepared, Attempts(self.retry, self.rng, timeout_s=prepared.timeout_s))

    def attempts(self, call: Call[Any]) -> Attempts:
        """The attempts of a unary call about to start."""
        return Attempts(
            self.retry, self.rng, timeout_s=_UNARY_TIMEOUT_S, repeatable=call.repeatable
        )
