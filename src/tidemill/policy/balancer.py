"""Chooses the prefill and the decode worker of a request: filter, score, pick.

DeepSeek publishes what its balancers aim at and not how (open-infra-index, day 6): prefill evens
out core-attention compute and input tokens per GPU, decode evens out KV-cache use and the number
of requests per GPU, because one overloaded GPU stalls its whole unit. The scores below put each
pair in one unit, and the lowest score wins:

    prefill = queued uncached tokens + own uncached tokens + own attention work     [tokens]
    decode  = share of KV blocks in use + requests / most requests anywhere         [shares]

where attention work is the number of (query, key) pairs of the uncached tokens, counted in tokens
that cost as much in the rest of the model, and cached tokens cost neither. Every router sees the
same reports, so among scores that differ by less than the reports are wrong each takes the better
of two drawn at random ("power of two choices").
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from tidemill.blocks import BLOCK_TOKENS
from tidemill.policy.load import InFlight, TierOverlap, WorkerLoad

_NOTHING = TierOverlap(0)


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Tolerances and limits of the picks.

    `attention_parity_tokens`: context at which a token's attention costs as much as the rest of
    the model; for V3 2 x 37e9 FLOPs / (61 layers x 128 heads x 2 x (192 + 128) FLOPs) = 14,800.
    `max_queued_tokens`: a prefill worker with this many queued has no room, so that requests
    wait in the router's fair queue and not in a worker's first-come queue.
    `min_scale_requests`: below this many, decode workers' request counts matter less.
    """

    near_tie_tokens: int = 64
    near_tie_ratio: float = 0.05
    near_tie_share: float = 0.02
    attention_parity_tokens: int = 14_800
    max_queued_tokens: int = 8192
    decode_reserve_tokens: int = BLOCK_TOKENS
    min_scale_requests: int = 32
    stale_after_s: float = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A request to be placed.

    `overlap`: leading blocks of the prompt that each worker is believed to hold.
    `excluded`: workers that refused it or that it failed on.
    """

    num_prompt_tokens: int
    overlap: Mapping[str, TierOverlap] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()

    @property
    def num_blocks(self) -> int:
        """Blocks of the whole prompt."""
        return -(-self.num_prompt_tokens // BLOCK_TOKENS)

    def cached_tokens(self, worker_id: str) -> int:
        """Prompt tokens that the worker need not compute: never the last."""
        held = self._overlap(worker_id).blocks * BLOCK_TOKENS
        return min(held, self.num_prompt_tokens - 1)

    def uncached_tokens(self, worker_id: str) -> int:
        """Prompt tokens that the worker would compute."""
        return self.num_prompt_tokens - self.cached_tokens(worker_id)

    def new_blocks(self, worker_id: str, *, extra_tokens: int = 0) -> int:
        """Blocks that the worker would have to allocate."""
        total = -(-(self.num_prompt_tokens + extra_tokens) // BLOCK_TOKENS)
        held = min(self._overlap(worker_id).blocks, self.num_prompt_tokens // BLOCK_TOKENS)
        return total - held

    def _overlap(self, worker_id: str) -> TierOverlap:
        return self.overlap.get(worker_id, _NOTHING)


def pick_prefill(
    loads: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    rng: Random,
    *,
    now: float,
    config: BalancerConfig = BalancerConfig(),
) -> WorkerLoad | None:
    """The worker to prefill on; None if none has room now."""
    scored: list[tuple[float, WorkerLoad]] = []
    for load in _eligible(loads, request, now, config):
        own = in_flight.unreported(load)
        queued = load.queued_uncached_tokens + own.tokens
        fits = load.free_blocks - own.blocks >= request.new_blocks(load.worker_id)
        if fits and queued < config.max_queued_tokens:
            scored.append((queued + _prefill_work(request, load.worker_id, config), load))
    return _choose(scored, config.near_tie_tokens, config.near_tie_ratio, rng)


def pick_decode(
    loads: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    rng: Random,
    *,
    now: float,
    config: BalancerConfig = BalancerConfig(),
) -> WorkerLoad | None:
    """The worker to decode on; None if none has room for the prompt and the reserve now.

    The prompt's blocks count from the pick on, though they fill only as prefill proceeds.
    """
    candidates: list[tuple[int, int, WorkerLoad]] = []
    for load in _eligible(loads, request, now, config):
        own = in_flight.unreported(load)
        free = load.free_blocks - own.blocks
        needed = request.new_blocks(load.worker_id, extra_tokens=config.decode_reserve_tokens)
        if free >= needed:
            requests = load.running + load.waiting + own.requests + 1
            candidates.append((load.total_blocks - free + needed, requests, load))
    scale = max([config.min_scale_requests, *(requests for _, requests, _ in candidates)])
    scored = [
        (used / load.total_blocks + requests / scale, load) for used, requests, load in candidates
    ]
    return _choose(scored, config.near_tie_share, config.near_tie_ratio, rng)


def _eligible(
    loads: Sequence[WorkerLoad], request: Placement, now: float, config: BalancerConfig
) -> Iterator[WorkerLoad]:
    """Workers that report, take new work, and have not refused this request."""
    for load in loads:
        fresh = now - load.observed_at <= config.stale_after_s
        if fresh and not load.draining and load.worker_id not in request.excluded:
            yield load


def _prefill_work(request: Placement, worker_id: str, config: BalancerConfig) -> float:
    """Tokens' worth of computing, attention included: each token attends to all before it."""
    total, cached = request.num_prompt_tokens, request.cached_tokens(worker_id)
    pairs = (total * total - cached * cached) / 2
    return total - cached + pairs / config.attention_parity_tokens


def _choose(
    scored: Sequence[tuple[float, WorkerLoad]], tie: float, tie_ratio: float, rng: Random
) -> WorkerLoad | None:
    """The better of two random ones among those close to the best."""
    if not scored:
        return None
    best = min(score for score, _ in scored)
    limit = best + max(tie, best * tie_ratio)
    near = [entry for entry in scored if entry[0] <= limit]
    pair = rng.sample(near, min(2, len(near)))
    return min(pair, key=lambda entry: entry[0])[1]
