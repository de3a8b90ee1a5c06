"""Chooses the prefill and the decode worker of a request: filter, score, pick.

DeepSeek publishes what its balancers aim at and not how (open-infra-index, day 6): prefill evens
out core-attention compute and input tokens per GPU, decode evens out KV-cache use and the number
of requests per GPU, because one overloaded GPU stalls its whole unit. Here (docs/adr/0020):

- What a worker is busy with now is its last report, less what it has computed since, and what all
  routers have sent since: this router's own work, times the number of routers there seem to be.
- Prefill goes where the first token is expected soonest. Where that is equal within what reports
  are wrong by, attention work and input tokens given lately decide.
- Decode goes where KV use and request count end up most equal, both relative to their means.
- A worker much slower than its peers gets nothing while others have room, but for one request now
  and then that tells whether it has recovered.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from random import Random
from statistics import median_low
from typing import NamedTuple

from tidemill.blocks import BLOCK_TOKENS
from tidemill.policy.load import Dispatch, InFlight, TierOverlap, Work, WorkerLoad

_NOTHING = TierOverlap(0)


@dataclass(frozen=True, slots=True)
class BalancerConfig:
    """Tolerances and limits of the picks.

    `attention_parity_tokens`: context at which a token's attention costs as much as the rest of
    the model; for V3 2 x 37e9 FLOPs / (61 layers x 128 heads x 2 x (192 + 128) FLOPs) = 14,800.
    `host_block_tokens`: what bringing a block back from host memory costs, in computed tokens.
    `max_queued_s`: a prefill worker with work for this long has no room, so that requests wait in
    the router's fair queue and not in a worker's first-come queue. It must cover the way from a
    worker that falls idle to its next prompt. Never fewer than `min_queued_tokens`, which should
    fill a step of the worker (`step_tokens`), or short prompts would no longer share one; never
    more than `max_queued_tokens`, which holds where the worker's pace is not known.
    `waste_weight`: what a token costs that is computed though another worker holds it: it delays
    all that come after. A request waits at the holder as long as that is cheaper, and finds that
    much more room there. Divided among those that lately asked for the same: what many ask for is
    worth holding in several places.
    Costs this close to the least count as equal: `near_tie_tokens` or `prefill_tie_ratio` of it,
    and `decode_tie_ratio`.
    `slow_ratio`: a worker this much slower than the median of its peers is avoided, and tried with
    one request every `probe_s` seconds.
    """

    near_tie_tokens: int = 64
    prefill_tie_ratio: float = 0.05
    decode_tie_ratio: float = 0.02
    attention_parity_tokens: int = 14_800
    host_block_tokens: float = 0.2
    max_queued_s: float = 0.01
    min_queued_tokens: int = 512
    max_queued_tokens: int = 8192
    waste_weight: float = 20.0
    decode_reserve_tokens: int = BLOCK_TOKENS
    slow_ratio: float = 2.0
    probe_s: float = 5.0
    stale_after_s: float = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """A request to be placed.

    `overlap`: leading blocks of the prompt that each worker is believed to hold.
    `num_alike`: how many requests of late began with the longest of these overlaps.
    `excluded`: workers that refused it or that it failed on.
    `output_tokens`: how many it is expected to generate; `growth_tokens`: how many a request that
    decodes somewhere is expected to generate still.
    """

    num_prompt_tokens: int
    overlap: Mapping[str, TierOverlap] = field(default_factory=dict)
    num_alike: int = 0
    excluded: frozenset[str] = frozenset()
    output_tokens: int = 0
    growth_tokens: float = 0.0

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

    def attention_pairs(self, worker_id: str) -> int:
        """(query, key) pairs of these: each token attends to itself and to all before it."""
        total, cached = self.num_prompt_tokens, self.cached_tokens(worker_id)
        return (total * (total + 1) - cached * (cached + 1)) // 2

    def new_blocks(self, worker_id: str, *, extra_tokens: int = 0) -> int:
        """Blocks that the worker would have to allocate."""
        total = -(-(self.num_prompt_tokens + extra_tokens) // BLOCK_TOKENS)
        held = min(self._overlap(worker_id).blocks, self.num_prompt_tokens // BLOCK_TOKENS)
        return total - held

    def host_blocks(self, worker_id: str) -> int:
        """Blocks that the worker would bring back from its host memory."""
        return self._overlap(worker_id).host

    def _overlap(self, worker_id: str) -> TierOverlap:
        return self.overlap.get(worker_id, _NOTHING)


class Scored(NamedTuple):
    """A worker with room; the least cost wins."""

    cost: float
    load: WorkerLoad


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
    scored = score_prefill(loads, request, in_flight, now=now, config=config)
    near = _near(scored, config.near_tie_tokens, config.prefill_tie_ratio)
    return _least_given(near, request, in_flight, rng, now=now)


def pick_decode(
    loads: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    rng: Random,
    *,
    now: float,
    config: BalancerConfig = BalancerConfig(),
) -> WorkerLoad | None:
    """The worker to decode on; None if none has room for the prompt and the reserve now."""
    scored = score_decode(loads, request, in_flight, now=now, config=config)
    near = _near(scored, 0.0, config.decode_tie_ratio)
    pair = rng.sample(near, min(2, len(near)))
    return min(pair, key=lambda each: each.cost).load if pair else None


def score_prefill(
    loads: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    *,
    now: float,
    config: BalancerConfig = BalancerConfig(),
) -> list[Scored]:
    """Workers with room for the prefill, and what it would take until its first token.

    A cost is the work queued and the request's own, in tokens of a worker of median pace, and what
    is wasted by computing what another worker holds.
    """
    able = _able(loads, request, now, config)
    queues = _queues(able, request, in_flight, now, config)
    least = min((queue.own for queue in queues), default=0.0)
    scored = []
    for queue in queues:
        load = queue.load
        if queue.room > 0 and queue.free_blocks >= request.new_blocks(load.worker_id):
            fetched = request.host_blocks(load.worker_id) * config.host_block_tokens
            wasted = queue.weight * (queue.own - least)
            cost = queue.tokens + queue.slow * (queue.own + fetched + wasted)
            scored.append(Scored(cost, load))
    slowness = {queue.load.worker_id: queue.slow for queue in queues}
    idle = {load.worker_id for load in able if not load.prefilling}
    due = idle & _due(able, in_flight, now, config)
    soon = any(
        queue.slow <= config.slow_ratio and queue.tokens < config.max_queued_tokens
        for queue in queues
    )
    return _sound(scored, slowness, due, config, soon=soon)


def room_in_s(
    loads: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    *,
    now: float,
    config: BalancerConfig = BalancerConfig(),
) -> float:
    """Seconds until a prefill worker whose queue is too long should have room; inf: cannot tell."""
    queues = _queues(_able(loads, request, now, config), request, in_flight, now, config)
    return min((queue.room_in_s for queue in queues if queue.room <= 0), default=math.inf)


def score_decode(
    loads: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    *,
    now: float,
    config: BalancerConfig = BalancerConfig(),
) -> list[Scored]:
    """Workers with room to decode, and what the request would add to their squared loads.

    Loads are KV blocks as forecast and requests, each relative to its mean; where both are equal
    everywhere a request as long as most costs about 2. The prompt's blocks count from the pick
    on, though they fill only as prefill proceeds.
    """
    able = _able(loads, request, now, config)
    unreported = [in_flight.unreported(load) for load in able]
    routers = in_flight.num_routers(able, unreported, sum(load.decoding for load in able))
    roomy = []
    for load, sent in zip(able, unreported, strict=True):
        name, sent_blocks = load.worker_id, sum(each.work.blocks for each in sent)
        reserve = request.new_blocks(name, extra_tokens=config.decode_reserve_tokens)
        if load.free_blocks - sent_blocks < reserve:
            continue
        requests = load.decoding + routers * len(sent)
        used = load.total_blocks - load.free_blocks + routers * sent_blocks
        used += requests * request.growth_tokens / BLOCK_TOKENS
        needed = max(request.new_blocks(name, extra_tokens=request.output_tokens), reserve)
        roomy.append(_Decoder(load, requests + 1 / 2, used + needed / 2, needed))
    slowness = _slowness(able, lambda load: load.decode_step_us)
    idle = {load.worker_id for load in able if not load.decoding}
    due = idle & _due(able, in_flight, now, config)
    return _sound(_added_squares(roomy), slowness, due, config)


def _able(
    loads: Sequence[WorkerLoad], request: Placement, now: float, config: BalancerConfig
) -> list[WorkerLoad]:
    """Workers that report, take new work, and have not refused this request."""
    return [
        load
        for load in loads
        if now - load.observed_at <= config.stale_after_s
        and not load.draining
        and load.worker_id not in request.excluded
    ]


class _Queue(NamedTuple):
    """A prefill worker's queue as a request would find it.

    In tokens of a worker of median pace: `tokens` queued, `room` for more. In the worker's own:
    what it would compute of the request, `own`. `weight` is of each token computed in vain.
    """

    load: WorkerLoad
    slow: float
    tokens: float
    room: float
    own: float
    weight: float
    free_blocks: float

    @property
    def room_in_s(self) -> float:
        """Seconds until there is room, if nothing comes."""
        pace = self.load.prefill_tokens_per_s * self.slow
        return -self.room / pace if pace else math.inf


def _queues(
    able: Sequence[WorkerLoad],
    request: Placement,
    in_flight: InFlight,
    now: float,
    config: BalancerConfig,
) -> list[_Queue]:
    unreported = [in_flight.unreported(load) for load in able]
    routers = in_flight.num_routers(able, unreported, sum(load.prefilling for load in able))
    slowness = _slowness(able, lambda load: 1 / (load.prefill_tokens_per_s or math.inf))
    nothing_held = _own_work(request, "", config)
    weight = config.waste_weight / (1 + request.num_alike)
    queues = []
    for load, sent in zip(able, unreported, strict=True):
        slow, own = slowness[load.worker_id], _own_work(request, load.worker_id, config)
        tokens = _queued_work(load, sent, now=now, routers=routers, config=config)
        certain = _certain_work(load, sent, now=now, routers=routers, config=config)
        room = slow * (_longest_queue(load, config) - certain) + weight * (nothing_held - own)
        free_blocks = load.free_blocks - sum(each.work.blocks for each in sent)
        queues.append(_Queue(load, slow, slow * tokens, room, own, weight, free_blocks))
    return queues


def _queued_work(
    load: WorkerLoad,
    sent: Sequence[Dispatch],
    *,
    now: float,
    routers: float,
    config: BalancerConfig,
) -> float:
    """What may be queued now: as reported, and sent since, less what was computed meanwhile.

    For each request that this router has sent, others like it have sent as much.
    """
    queued = _work(load.queued_uncached_tokens, load.queued_attention_pairs, config)
    coming = _coming(sent, routers, config)
    pace = load.prefill_tokens_per_s
    return _worked_off(queued, coming, pace, since=load.observed_at, until=now)


def _certain_work(
    load: WorkerLoad,
    sent: Sequence[Dispatch],
    *,
    now: float,
    routers: float,
    config: BalancerConfig,
) -> float:
    """The same, where what was sent just before the report counts as being in it.

    It is least what this router has sent there. Were it to count twice, a worker with little
    queued would seem to have work left when it has none.
    """
    pace, made_at = load.prefill_tokens_per_s, load.observed_at
    before = [dispatch for dispatch in sent if dispatch.at < made_at]
    own = _worked_off(0.0, _coming(before, 1.0, config), pace, since=0.0, until=made_at)
    queued = max(_work(load.queued_uncached_tokens, load.queued_attention_pairs, config), own)
    after = _coming(sent[len(before) :], routers, config)
    return _worked_off(queued, after, pace, since=made_at, until=now)


def _coming(
    sent: Sequence[Dispatch], routers: float, config: BalancerConfig
) -> list[tuple[float, float]]:
    """When work was sent, and how much all routers sent then, as far as can be told."""
    return [
        (dispatch.at, routers * _work(dispatch.work.tokens, dispatch.work.pairs, config))
        for dispatch in sent
    ]


def _worked_off(
    queued: float,
    arriving: Iterable[tuple[float, float]],
    pace: float,
    *,
    since: float,
    until: float,
) -> float:
    """What is left of what was queued at one instant, and came from then on, at another."""
    at = since
    for came, work in arriving:
        queued = max(queued - pace * max(came - at, 0.0), 0.0) + work
        at = max(came, at)
    return max(queued - pace * max(until - at, 0.0), 0.0)


def _longest_queue(load: WorkerLoad, config: BalancerConfig) -> float:
    """How many tokens the worker may have queued."""
    if not load.prefill_tokens_per_s:
        return config.max_queued_tokens
    bounded = max(load.prefill_tokens_per_s * config.max_queued_s, config.min_queued_tokens)
    return min(bounded, config.max_queued_tokens)


def _own_work(request: Placement, worker_id: str, config: BalancerConfig) -> float:
    """What the worker would compute of the request."""
    return _work(request.uncached_tokens(worker_id), request.attention_pairs(worker_id), config)


def _work(tokens: float, pairs: float, config: BalancerConfig) -> float:
    """Tokens' worth of computing, attention included."""
    return tokens + pairs / config.attention_parity_tokens


def _slowness(
    loads: Sequence[WorkerLoad], seconds: Callable[[WorkerLoad], float]
) -> dict[str, float]:
    """How many times the median each worker takes for the same; 1 where unknown."""
    took = {load.worker_id: seconds(load) for load in loads}
    known = [each for each in took.values() if each > 0]
    median = median_low(known) if known else 1.0
    return {name: each / median if each > 0 else 1.0 for name, each in took.items()}


def _due(
    loads: Sequence[WorkerLoad], in_flight: InFlight, now: float, config: BalancerConfig
) -> Set[str]:
    """Workers that this router has not asked for anything for long."""
    names = [load.worker_id for load in loads]
    return {name for name in names if in_flight.idle_s(name, now=now) >= config.probe_s}


def _sound(
    scored: Sequence[Scored],
    slowness: Mapping[str, float],
    due: Set[str],
    config: BalancerConfig,
    *,
    soon: bool = False,
) -> list[Scored]:
    """Without the slow ones, unless only they have room; one that is due for a try, alone.

    `soon`: others will have room before long, so it is better to wait than to take a slow one.
    """
    sound, slow = [], []
    for each in scored:
        if slowness[each.load.worker_id] <= config.slow_ratio:
            sound.append(each)
        elif each.load.worker_id in due:
            return [each]
        else:
            slow.append(each)
    return sound if sound or soon else slow


def _near(scored: Sequence[Scored], tie: float, tie_ratio: float) -> list[Scored]:
    """Those whose cost is close to the least."""
    least = min((each.cost for each in scored), default=0.0)
    limit = least + max(tie, least * tie_ratio)
    return [each for each in scored if each.cost <= limit]


def _least_given(
    near: Sequence[Scored], request: Placement, in_flight: InFlight, rng: Random, *, now: float
) -> WorkerLoad | None:
    """Whose attention work and input tokens of late this evens out most, by this router's part."""
    if not near:
        return None
    given = {each.load.worker_id: in_flight.given(each.load.worker_id, now=now) for each in near}
    mean = Work.sum(given.values()).faded(1 / len(given))

    def added_squares(load: WorkerLoad) -> float:
        has = given[load.worker_id]
        tokens = request.uncached_tokens(load.worker_id)
        pairs = request.attention_pairs(load.worker_id)
        requests = mean.requests or 1.0
        return _weighed(tokens, mean.tokens / requests, has.tokens + tokens / 2, mean.tokens) + (
            _weighed(pairs, mean.pairs / requests, has.pairs + pairs / 2, mean.pairs)
        )

    return min(rng.sample([each.load for each in near], len(near)), key=added_squares)


class _Decoder(NamedTuple):
    """A decode worker with room, and half of what the request adds to it, all as forecast."""

    load: WorkerLoad
    requests: float
    blocks: float
    needed_blocks: int

    @property
    def share(self) -> float:
        """Of its blocks in use."""
        return self.blocks / self.load.total_blocks


def _added_squares(decoders: Sequence[_Decoder]) -> list[Scored]:
    """What each would add to the sum of squares of relative KV use and relative request count.

    So a prompt that is longer than most goes by KV use, a shorter one by request count. Workers
    that should run out of blocks count only if all should.
    """
    ample = [
        each for each in decoders if each.blocks + each.needed_blocks / 2 <= each.load.total_blocks
    ]
    chosen = ample or decoders
    requests, blocks = (sum(each.requests for each in chosen), sum(each.blocks for each in chosen))
    shares = sum(each.share for each in chosen)
    return [
        Scored(
            _weighed(each.needed_blocks, blocks / requests, each.share, shares / len(chosen))
            + _weighed(1, 1, each.requests, requests / len(chosen)),
            each.load,
        )
        for each in chosen
    ]


def _weighed(own: float, mean_own: float, load: float, mean: float) -> float:
    """A load relative to its mean, by how much of it a request is relative to the mean request.

    With `load` half-way between before and after, it is what the request adds to the square.
    """
    return own / mean_own * load / mean if mean else 0.0
