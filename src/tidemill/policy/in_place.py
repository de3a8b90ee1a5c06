"""Whether a prompt is prefilled where it will be decoded.

Of a follow-up turn the decode worker of the turn before holds nearly all. To prefill the rest
there spares a hand-over of the whole prompt, and costs the worker's running sequences the time
that the rest takes, which each worker bounds by the number of tokens that it computes in place.
"""

from collections.abc import Mapping, Sequence

from tidemill.policy.balancer import BalancerConfig, Placement, score_decode
from tidemill.policy.load import InFlight, WorkerLoad

_MORE_RATIO, _MORE_REQUESTS = 1.25, 4


def pick_in_place(
    loads: Sequence[WorkerLoad],
    request: Placement,
    prefilling: InFlight,
    decoding: InFlight,
    in_place_tokens: Mapping[str, int],
    *,
    now: float,
    config: BalancerConfig,
) -> WorkerLoad | None:
    """The decode worker to prefill and decode on; None if no one should do both.

    `loads` are all decode workers'. The chosen one holds a start of the prompt, no shorter than any
    other worker holds, so nothing is computed for the client's money that lies elsewhere. All that
    it has to compute, with this prompt's rest, is at most its `in_place_tokens`. It has room, is
    not slow, and has hardly more requests than the least busy one: at most a quarter, and four.
    """
    longest = max((overlap.blocks for overlap in request.overlap.values()), default=0)
    holders = {
        load.worker_id
        for load in loads
        if load.worker_id in request.overlap
        and request.overlap[load.worker_id].blocks == longest > 0
        and _prefilling_tokens(load, prefilling) + request.uncached_tokens(load.worker_id)
        <= in_place_tokens.get(load.worker_id, 0)
    }
    if not holders:
        return None
    scored = score_decode(loads, request, decoding, now=now, config=config)
    requests = [each.load.decoding + len(decoding.unreported(each.load)) for each in scored]
    most = _MORE_RATIO * min(requests, default=0) + _MORE_REQUESTS
    fit = [
        each
        for each, count in zip(scored, requests, strict=True)
        if each.load.worker_id in holders and count <= most
    ]
    return min(fit, key=lambda each: each.cost).load if fit else None


def _prefilling_tokens(load: WorkerLoad, prefilling: InFlight) -> float:
    unreported = sum(sent.work.tokens for sent in prefilling.unreported(load))
    return load.queued_uncached_tokens + unreported
