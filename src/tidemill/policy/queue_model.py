"""How long a request will wait, from how fast requests have left the queue.

The queue's rate is what it gave out, in uncached prompt tokens a second, while its head stood still
for want of room: whatever is scarce, prefill, KV blocks or places, shows in it. Until enough was
seen, what the workers report of their own speed counts like a second of it. While the head moves,
nobody waits.

The rate of a flow (a tenant in a class) counts too. Those who come later take turns as well, so a
long queue of one tenant goes on at the pace at which it went, not at that of what is ahead now.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from tidemill.policy.fair_queue import Ahead

_HALF_LIFE_S = 10.0
_REPORTED_S = 1.0  # seconds of watching that the workers' own report is worth
_MIN_WATCHED_S = 1.0
_MIN_SERVED = 4
_WAIT_SLACK = 1.25
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


@dataclass(slots=True)
class _Rate:
    """Tokens that went and the seconds it took, half of either of the last half-life.

    `served` is by how many requests, `since` how long ago the last went.
    """

    tokens: float = 0.0
    served: int = 0
    seconds: float = 0.0
    since: float = 0.0

    def watch(self, seconds: float) -> None:
        self.since += seconds

    def count(self, tokens: int) -> None:
        """A request has gone: its tokens took the whole time since the last."""
        kept = self.fade(self.since)
        weight = (1 - kept) * _HALF_LIFE_S / math.log(2)
        self.seconds += weight
        self.tokens += tokens * (weight / self.since if self.since else 1.0)
        self.served += 1
        self.since = 0.0

    def fade(self, seconds: float) -> float:
        """Let time pass in which nobody waited."""
        kept: float = 0.5 ** (seconds / _HALF_LIFE_S)
        self.tokens *= kept
        self.seconds *= kept
        return kept

    def per_second(self, reported: float = 0.0) -> float | None:
        """Tokens a second; None where too little was seen."""
        seconds = self.seconds + self.since
        if reported:
            return (self.tokens + reported * _REPORTED_S) / (seconds + _REPORTED_S)
        if seconds < _MIN_WATCHED_S or self.served < _MIN_SERVED:
            return None
        return self.tokens / seconds


@dataclass(slots=True)
class _Flow:
    """`watched` is up to where on the model's clock its rate has been brought."""

    watched: float
    waiting: int = 0
    rate: _Rate = field(default_factory=_Rate)


@dataclass(slots=True)
class _Lag:
    """Mean and mean deviation of seconds, as TCP keeps them of round trips (RFC 6298)."""

    mean: float = 0.0
    deviation: float = 0.0
    known: bool = False

    def add(self, seconds: float) -> None:
        if not self.known:
            self.mean, self.deviation, self.known = seconds, seconds / 2, True
            return
        self.deviation += (abs(seconds - self.mean) - self.deviation) / 4
        self.mean += (seconds - self.mean) / 8


class QueueModel:
    """Told of everything that enters and leaves one queue; `clock` is in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._stuck = False
        self._watched = 0.0  # seconds in which the head stood still
        self._rate = _Rate()
        self._flows: dict[Hashable, _Flow] = {}
        self._lag = _Lag()
        self._reported = 0.0

    @property
    def stuck(self) -> bool:
        """Whether the head waits for room."""
        return self._stuck

    def entered(self, flow: Hashable) -> None:
        """A request of the flow begins to wait."""
        self._advance()
        self._flows.setdefault(flow, _Flow(self._watched)).waiting += 1

    def left(self, flow: Hashable, tokens: int = 0) -> None:
        """A request of the flow was given out, with so many tokens, or gave up, with none."""
        self._advance()
        its = self._of(flow)
        if self._stuck and tokens:
            self._rate.count(tokens)
            its.rate.count(tokens)
        its.waiting -= 1
        if not its.waiting:
            del self._flows[flow]

    def moves(self) -> None:
        """Nobody is left waiting."""
        self._advance()
        self._stuck = False

    def sticks(self, reported: float) -> None:
        """The head waits for room; workers say they prefill so many tokens a second, 0: unknown."""
        self._advance()
        self._stuck, self._reported = True, reported

    def began(self, lag_s: float) -> None:
        """A first token came so many seconds after its request was given out."""
        self._lag.add(lag_s)

    def gave_up(self, lag_s: float) -> None:
        """No first token came in so many seconds: it would have been later."""
        if lag_s > self._lag.mean:
            self._lag.add(lag_s)

    def wait_s(self, flow: Hashable, ahead: Ahead) -> float | None:
        """Seconds until a request with so much ahead is given out; None: cannot tell yet."""
        self._advance()
        if not self._stuck:
            return 0.0
        rate = self._rate.per_second(self._reported)
        if rate is None:
            return None
        own = self._of(flow).rate.per_second()
        return max(ahead.tokens / rate, ahead.own_tokens / own if own else 0.0)

    def first_token_s(self, wait_s: float) -> float:
        """Seconds to the first token of a request that is given out in `wait_s`, as of late."""
        return wait_s + self._lag.mean

    def latest_first_token_s(self, wait_s: float) -> float:
        """What that seldom exceeds."""
        return _WAIT_SLACK * wait_s + self._lag.mean + 2 * self._lag.deviation

    def retry_after_s(self, tokens: int) -> float:
        """When somebody who finds so many tokens waiting should ask again, within bounds."""
        self._advance()
        rate = self._rate.per_second(self._reported)
        return within_bounds(tokens / rate if rate else 0.0)

    def check_integrity(self) -> None:
        """That nothing is left of requests that no longer wait."""
        assert not self._flows

    def _of(self, flow: Hashable) -> _Flow:
        """The flow, its rate brought up to now."""
        its = self._flows[flow]
        its.rate.watch(self._watched - its.watched)
        its.watched = self._watched
        return its

    def _advance(self) -> None:
        now = self._clock()
        passed, self._at = now - self._at, now
        if self._stuck:
            self._watched += passed
            self._rate.watch(passed)
        else:
            self._rate.fade(passed)


def within_bounds(retry_after_s: float) -> float:
    """Neither so soon that nothing has changed nor so late that nobody comes back."""
    return min(max(retry_after_s, _MIN_RETRY_S), _MAX_RETRY_S)
