"""A fleet of prefill and decode workers and their routers on a virtual clock.

The model: a prefill worker computes one prompt after another, at `PREFILL_TOKENS_PER_S` tokens
plus their attention; nothing is cached. Both workers of a request are chosen at once, and its KV
counts on the decode worker from then on. A decode worker makes one token a step for each request;
a step takes STEP_S + requests * REQUEST_S + KV tokens * KV_TOKEN_S, about 45 ms with 88 requests.
Requests come one by one at random (Poisson), each to a router drawn at random, which sends it
2 ms away and hears of its first token 2 ms late; while no worker has room it looks again when it
expects that, as the dispatcher does. A router sees each worker as it was when its last report was
made; the paces in reports are wrong by up to 5 %.
"""

import heapq
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from statistics import fmean

from loadtest.traces import Lengths
from tidemill.blocks import BLOCK_TOKENS
from tidemill.policy import WorkerLoad

PREFILL_TOKENS_PER_S = 16_000
ATTENTION_PARITY_TOKENS = 14_800
STEP_S, REQUEST_S, KV_TOKEN_S = 0.030, 100e-6, 0.05e-6
POOL_BLOCKS = 6000
SEND_S, SOON_S, POLL_S = 0.002, 0.001, 1.0
PACE_ERROR = 0.05
SAMPLE_S = 0.1
MAX_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class View:
    """How many routers there are, how often each hears of a worker, how old reports are then.

    `told`: whether the routers know how old.
    """

    routers: int = 4
    every_s: float = 0.1
    delay_s: float = 0.0
    told: bool = True


@dataclass(eq=False)
class Request:
    """One request on its way; `pairs` are its attention work."""

    key: str
    lengths: Lengths
    router: "Router"
    came_at: float
    prefill: int = 0
    decode: int = 0
    first_token_at: float = 0.0

    @property
    def tokens(self) -> int:
        return self.lengths.num_prompt_tokens

    @property
    def pairs(self) -> int:
        return _pairs(self.tokens)

    @property
    def work(self) -> float:
        return _work(self.tokens)


class Router(ABC):
    """Places requests; hears reports and ends."""

    def __init__(self, number: int, workers: int, rng: Random) -> None:
        self.prefills: list[WorkerLoad] = [_report("p", each, 0.0) for each in range(workers)]
        self.decodes: list[WorkerLoad] = [_report("d", each, 0.0) for each in range(workers)]
        self.waiting: deque[Request] = deque()
        self.polling = False
        self.number = number
        self.rng = rng

    @abstractmethod
    def place(self, request: Request, now: float) -> tuple[int, int] | None:
        """Indices of the two workers; None: none has room now."""

    def room_in_s(self, request: Request, now: float) -> float:  # noqa: ARG002 - not all can tell
        """Seconds until it is worth looking for room again."""
        return POLL_S

    def prefilled(self, request: Request) -> None:  # noqa: B027 - not all care
        """The request's first token is there."""

    def ended(self, request: Request) -> None:  # noqa: B027 - not all care
        """Its last one is."""


class _Prefill:
    def __init__(self, fleet: "Fleet") -> None:
        self.fleet = fleet
        self.rate = PREFILL_TOKENS_PER_S
        self.queue: deque[Request] = deque()
        self.given_tokens = self.given_pairs = 0
        self.began = 0.0

    def take(self, request: Request) -> None:
        self.given_tokens += request.tokens
        self.given_pairs += request.pairs
        self.queue.append(request)
        if len(self.queue) == 1:
            self._begin()

    def report(self, number: int) -> WorkerLoad:
        tokens = sum(request.tokens for request in self.queue)
        pairs = sum(request.pairs for request in self.queue)
        if self.queue:
            head = self.queue[0]
            done = min((self.fleet.now - self.began) * self.rate / head.work, 1.0)
            tokens -= round(head.tokens * done)
            pairs -= round(head.pairs * done * done)
        return _report(
            "p",
            number,
            self.fleet.now,
            queued_uncached_tokens=tokens,
            queued_attention_pairs=pairs,
            prefilling=len(self.queue),
            prefill_tokens_per_s=round(self.rate * self.fleet.error()),
        )

    def _begin(self) -> None:
        self.began = self.fleet.now
        self.fleet.at(self.fleet.now + self.queue[0].work / self.rate, self._done)

    def _done(self) -> None:
        request = self.queue.popleft()
        if self.queue:
            self._begin()
        self.fleet.prefilled(request)


class _Decode:
    def __init__(self, fleet: "Fleet") -> None:
        self.fleet = fleet
        self.slowness = 1.0
        self.running = self.waiting = self.kv_tokens = self.steps = self.given = 0
        self.ends: list[tuple[int, int, Request]] = []
        self.stepping = False

    def expect(self, request: Request) -> None:
        self.given += 1
        self.waiting += 1
        self.kv_tokens += request.tokens

    def start(self, request: Request) -> None:
        self.waiting -= 1
        self.running += 1
        end = self.steps + request.lengths.num_output_tokens
        heapq.heappush(self.ends, (end, next(self.fleet.numbers), request))
        if not self.stepping:
            self.stepping = True
            self._next()

    @property
    def step_s(self) -> float:
        busy = STEP_S + self.running * REQUEST_S + self.kv_tokens * KV_TOKEN_S
        return busy * self.slowness

    def report(self, number: int) -> WorkerLoad:
        return _report(
            "d",
            number,
            self.fleet.now,
            running=self.running,
            waiting=self.waiting,
            free_blocks=max(POOL_BLOCKS - self.kv_tokens // BLOCK_TOKENS, 0),
            decode_step_us=round(1e6 * self.step_s * self.fleet.error()),
        )

    def _next(self) -> None:
        self.fleet.at(self.fleet.now + self.step_s, self._step)

    def _step(self) -> None:
        self.steps += 1
        self.kv_tokens += self.running
        while self.ends and self.ends[0][0] <= self.steps:
            _, _, request = heapq.heappop(self.ends)
            self.running -= 1
            self.kv_tokens -= request.tokens + request.lengths.num_output_tokens
            self.fleet.ended(request)
        if self.running:
            self._next()
        else:
            self.stepping = False


@dataclass
class Seen:
    """What was seen of all workers, by instant, and of all requests, after the warm-up."""

    given_tokens: list[list[int]] = field(default_factory=list)
    given_pairs: list[list[int]] = field(default_factory=list)
    kv_tokens: list[list[int]] = field(default_factory=list)
    requests: list[list[int]] = field(default_factory=list)
    given_requests: list[list[int]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)


class Fleet:
    """`workers` of each role; `lengths` come once, so fast that prefill is busy for `busy`."""

    def __init__(
        self,
        lengths: Sequence[Lengths],
        make_router: Callable[[int, int, Random], Router],
        view: View,
        *,
        workers: int = 8,
        busy: float = 0.7,
        warm_up_s: float = 20.0,
        seed: int = 1,
    ) -> None:
        self.now = 0.0
        self.numbers = itertools.count()
        self.prefills = [_Prefill(self) for _ in range(workers)]
        self.decodes = [_Decode(self) for _ in range(workers)]
        self.seen = Seen()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._rng = Random(seed)
        self._view = view
        self.warm_up_s = warm_up_s
        self._lengths = iter(lengths)
        work = fmean(_work(each.num_prompt_tokens) for each in lengths)
        self.requests_per_s = busy * workers * PREFILL_TOKENS_PER_S / work
        self._routers = [
            make_router(number, workers, Random(seed + 1 + number))
            for number in range(view.routers)
        ]

    def run(self) -> Seen:
        """Until the last request has come: what follows is no steady load."""
        for router in self._routers:
            for number in range(len(self.prefills)):
                for report in (self._report_prefill, self._report_decode):
                    first = self._rng.random() * self._view.every_s
                    self._every(self._view.every_s, first, report, router, number)
        self._every(SAMPLE_S, self.warm_up_s, self._sample)
        self.at(0.0, self._come)
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            try:
                happen()
            except StopIteration:
                break
        return self.seen

    def at(self, instant: float, happen: Callable[[], None]) -> None:
        """Let it happen then."""
        heapq.heappush(self._events, (instant, next(self.numbers), happen))

    def error(self) -> float:
        """What a reported pace is wrong by."""
        return 1 + self._rng.uniform(-PACE_ERROR, PACE_ERROR)

    def prefilled(self, request: Request) -> None:
        request.first_token_at = self.now
        if self.now > self.warm_up_s:
            self.seen.ttft_s.append(self.now - request.came_at)
        self.decodes[request.decode].start(request)
        self.at(self.now + SEND_S, partial(self._hear_prefilled, request))

    def ended(self, request: Request) -> None:
        if self.now > self.warm_up_s:
            took = self.now - request.first_token_at
            self.seen.tpot_s.append(took / request.lengths.num_output_tokens)
        request.router.ended(request)

    def _come(self) -> None:
        router = self._rng.choice(self._routers)
        key = str(next(self.numbers))
        router.waiting.append(Request(key, next(self._lengths), router, self.now))
        self._place(router)
        self.at(self.now + self._rng.expovariate(self.requests_per_s), self._come)

    def _place(self, router: Router) -> None:
        while router.waiting:
            placed = router.place(router.waiting[0], self.now)
            if placed is None:
                self._look_again(router)
                return
            request = router.waiting.popleft()
            request.prefill, request.decode = placed
            self.at(self.now + SEND_S, partial(self._land, request))

    def _hear_prefilled(self, request: Request) -> None:
        request.router.prefilled(request)
        self._place(request.router)

    def _look_again(self, router: Router) -> None:
        def look() -> None:
            router.polling = False
            self._place(router)

        if not router.polling:
            room_s = router.room_in_s(router.waiting[0], self.now)
            router.polling = True
            self.at(self.now + min(room_s + SOON_S, POLL_S), look)

    def _land(self, request: Request) -> None:
        self.decodes[request.decode].expect(request)
        self.prefills[request.prefill].take(request)

    def _report_prefill(self, router: Router, number: int) -> None:
        load = self.prefills[number].report(number)
        self._deliver(router, router.prefills, number, load)

    def _report_decode(self, router: Router, number: int) -> None:
        self._deliver(router, router.decodes, number, self.decodes[number].report(number))

    def _deliver(
        self, router: Router, into: list[WorkerLoad], number: int, load: WorkerLoad
    ) -> None:
        def hear() -> None:
            made_at = load.observed_at if self._view.told else self.now
            into[number] = replace(load, observed_at=made_at)
            self._place(router)

        self.at(self.now + self._view.delay_s, hear)

    def _sample(self) -> None:
        seen = self.seen
        seen.given_tokens.append([each.given_tokens for each in self.prefills])
        seen.given_pairs.append([each.given_pairs for each in self.prefills])
        seen.kv_tokens.append([each.kv_tokens for each in self.decodes])
        seen.requests.append([each.running + each.waiting for each in self.decodes])
        seen.given_requests.append([each.given for each in self.decodes])

    def _every(
        self, period_s: float, first: float, happen: Callable[..., None], *arguments: object
    ) -> None:
        def again() -> None:
            happen(*arguments)
            self.at(self.now + period_s, again)

        self.at(first, again)


def _pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _work(tokens: int) -> float:
    return tokens + _pairs(tokens) / ATTENTION_PARITY_TOKENS


def _report(role: str, number: int, now: float, **figures: int) -> WorkerLoad:
    free_blocks = figures.pop("free_blocks", POOL_BLOCKS)
    return WorkerLoad(
        worker_id=f"{role}{number}",
        epoch=1,
        sequence=1,
        observed_at=now,
        free_blocks=free_blocks,
        total_blocks=POOL_BLOCKS,
        **figures,  # type: ignore[arg-type] # none of them is `draining`
    )
