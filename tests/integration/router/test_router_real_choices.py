"""Several choices and log-probabilities through the router and real workers."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.redis_process import RedisProcess
from tests.router_harness import Heard, RouterHarness, listen
from tests.router_workers import Pair, TlsOf, ask, check_usage, router_over, split_pair
from tests.worker_harness import metric, settled, slow_down, worker_at
from tidemill.api.common.v1 import lifecycle_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2
from tidemill.errors import FailedPrecondition
from tidemill.policy.seeds import choice_seed
from tidemill.worker.config import Role

pytestmark = pytest.mark.redis

SEED = 99


@pytest.fixture
async def pair(tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf) -> AsyncIterator[Pair]:
    async with split_pair(tiny_dir, ledger, tls_files) as made:
        yield made


def sampled(request_id: str, n: int, **fields: Any) -> router_pb2.GenerateRequest:
    request = ask(request_id, max_tokens=fields.pop("max_tokens", 12), **fields)
    request.sampling.temperature, request.sampling.seed, request.sampling.n = 1.0, SEED, n
    return request


def choices_of(heard: Heard, n: int) -> list[list[int]]:
    """Each choice's tokens; what its end says of them must be so."""
    found: list[list[int]] = [[] for _ in range(n)]
    for chunk in heard.chunks:
        assert chunk.first_index == len(found[chunk.choice])
        found[chunk.choice] += chunk.token_ids
    ends = [each.choice_end for each in heard.messages if each.HasField("choice_end")]
    told = {end.choice: end.completion_tokens for end in ends}
    assert told == {choice: len(tokens) for choice, tokens in enumerate(found)}
    return found


async def one_by_one(router: RouterHarness, n: int, **fields: Any) -> list[Heard]:
    """What single requests with the choices' seeds get."""
    heard = []
    for index in range(n):
        request = sampled(f"single-{index}", 1, **fields)
        request.sampling.seed = choice_seed(SEED, index)
        heard.append(await router.generate(request))
    return heard


async def test_choices_are_what_single_requests_get_and_cost_one_prompt(pair: Pair) -> None:
    prefill, _, router = pair
    heard = await router.generate(sampled("several", 3))
    assert metric(prefill, "computed_tokens_total") == 200
    usage = check_usage(heard, 200)
    assert (usage.cache_miss_tokens, usage.completion_tokens) == (200, 36)
    choices = choices_of(heard, 3)
    assert len({tuple(tokens) for tokens in choices}) == 3
    receipt = heard.completed.receipt
    assert receipt.miss_cost_pico == 200 * receipt.prices.miss_pico
    assert receipt.output_cost_pico == 36 * receipt.prices.output_pico
    assert [single.token_ids for single in await one_by_one(router, 3)] == choices


async def test_a_stop_string_ends_one_real_choice_and_not_the_others(pair: Pair) -> None:
    _, decode, router = pair
    singles = await one_by_one(router, 3, max_tokens=40)
    texts = [single.text for single in singles]
    cut = next(
        text[start : start + 3]
        for text in texts[:1]
        for start in range(2, len(text) - 3)
        if text.index(text[start : start + 3]) == start
        and not any(text[start : start + 3] in other for other in texts[1:])
    )
    slow_down(decode, 0.005)
    heard = await router.generate(sampled("several", 3, max_tokens=40, stop=[cut]))
    told = ["".join(c.text for c in heard.chunks if c.choice == each) for each in range(3)]
    assert told == [texts[0][: texts[0].index(cut)], *texts[1:]]
    choices = choices_of(heard, 3)
    assert len(choices[0]) < 40
    assert choices[1:] == [single.token_ids for single in singles[1:]]
    usage = check_usage(heard, 200)
    assert usage.completion_tokens == sum(map(len, choices))
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_LENGTH


async def test_choices_cancelled_or_of_one_token_bill_what_there_is(pair: Pair) -> None:
    _, decode, router = pair
    short = await router.generate(sampled("short", 4, max_tokens=1))
    assert [len(tokens) for tokens in choices_of(short, 4)] == [1, 1, 1, 1]
    assert check_usage(short, 200).completion_tokens == 4
    slow_down(decode, 0.01)
    call = router.call(sampled("long", 3, max_tokens=500))
    read = [await call.read() for _ in range(8)]
    assert await router.cancel("long")
    heard = await listen(call)
    heard.messages[:0] = read
    assert heard.completed.finish_reason == lifecycle_pb2.FINISH_REASON_CANCELLED
    tokens = sum(map(len, choices_of(heard, 3)))
    assert check_usage(heard, 200).completion_tokens == tokens < 1500


async def test_real_log_probabilities_reach_the_client(pair: Pair) -> None:
    _, _, router = pair
    request = ask("scored", 300, max_tokens=5)
    request.sampling.logprobs, request.sampling.prompt_logprobs = 3, 2
    first = await router.generate(request)
    scored = [one for each in first.messages for one in each.prompt_scored.logprobs]
    assert len(scored) == 299
    told = [one for chunk in first.chunks for one in chunk.logprobs]
    assert len(told) == 5
    for token_id, one in zip(first.token_ids, told, strict=True):
        assert one.top_token_ids[0] == token_id  # greedy
        assert one.logprob == one.top_logprobs[0] < 0
    request.request_id = "scored-again"
    again = await router.generate(request)
    assert check_usage(again, 300).cache_hit_tokens == 0, "a scored prompt is computed whole"
    assert [one for each in again.messages for one in each.prompt_scored.logprobs] == scored


async def test_more_choices_than_the_memory_can_hold_are_refused_by_name(
    tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf
) -> None:
    async with (
        worker_at(Role.BOTH, tiny_dir, tls_files, num_blocks=8) as both,
        router_over(tiny_dir, ledger, tls_files, f"both@{both.address}") as router,
    ):
        heard = await router.generate(sampled("too-many", 16, max_tokens=100))
        assert isinstance(heard.error, FailedPrecondition)
        assert heard.error.reason == "KV_POOL_TOO_SMALL"
        await settled(both)
