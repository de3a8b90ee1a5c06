"""In-place prefill through the router over real workers: whom it picks, and what is billed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.redis_process import RedisProcess
from tests.router_workers import Pair, TlsOf, ask, check_usage, split_pair
from tests.worker_harness import metric, prompt_of
from tidemill.api.common.v1 import usage_pb2
from tidemill.api.router.v1 import router_service_pb2 as router_pb2

pytestmark = pytest.mark.redis

IN_PLACE_TOKENS = 100


@pytest.fixture
async def pair(tiny_dir: Path, ledger: RedisProcess, tls_files: TlsOf) -> AsyncIterator[Pair]:
    async with split_pair(tiny_dir, ledger, tls_files, in_place_tokens=IN_PLACE_TOKENS) as made:
        yield made


async def two_turns(pair: Pair, new_tokens: int) -> tuple[router_pb2.GenerateRequest, int]:
    """A first turn of 100 and 93 tokens, and the request of a second with so many more."""
    router = pair[2]
    first = await router.generate(ask("turn1", 100, max_tokens=93))
    assert check_usage(first, 100).prompt.prefill_site == usage_pb2.PREFILL_SITE_PREFILL_WORKER
    turn = ask("turn2", max_tokens=4)
    tokens = [*prompt_of(100), *first.token_ids, *prompt_of(new_tokens, seed=4)]
    turn.tokens.token_ids[:] = tokens
    return turn, len(tokens)


async def test_a_short_new_turn_is_prefilled_where_the_last_answer_was_generated(
    pair: Pair,
) -> None:
    prefill, decode, router = pair
    turn, num_tokens = await two_turns(pair, 20)
    computed = metric(prefill, "computed_tokens_total")
    heard = await router.generate(turn)
    usage = check_usage(heard, num_tokens)
    assert usage.prompt.prefill_site == usage_pb2.PREFILL_SITE_DECODE_WORKER
    assert usage.prompt.prefill_worker_id == "d"
    assert usage.cache_hit_tokens == usage.prompt.reused_device_tokens == 192
    assert usage.prompt.computed_tokens == num_tokens - 192 == 21
    billed = heard.completed.receipt.usage
    assert (billed.cache_hit_tokens, billed.cache_miss_tokens) == (192, 21)
    assert metric(prefill, "computed_tokens_total") == computed
    assert metric(decode, "computed_tokens_total") == 21
    assert metric(decode, "pulls_total", transport="grpc") == 1  # the first turn's alone


async def test_a_long_new_turn_is_prefilled_by_a_prefill_worker(pair: Pair) -> None:
    turn, num_tokens = await two_turns(pair, IN_PLACE_TOKENS)
    usage = check_usage(await pair[2].generate(turn), num_tokens)
    assert usage.prompt.prefill_worker_id == "p"


async def test_a_decode_worker_that_holds_less_than_believed_sends_the_prompt_to_the_prefill_pool(
    pair: Pair,
) -> None:
    """One refusal, at once another way, and nothing of it on the bill."""
    _, decode, router = pair
    turn, num_tokens = await two_turns(pair, 20)
    decode.worker.in_place_tokens = 20  # as if blocks had been evicted behind the router's back
    heard = await router.generate(turn)
    usage = check_usage(heard, num_tokens)
    assert usage.prompt.prefill_worker_id == "p"
    assert usage.prompt.prefill_site == usage_pb2.PREFILL_SITE_PREFILL_WORKER
    assert metric(decode, "refusals_total", reason="PREFILL_FULL") == 1
    assert heard.completed.receipt.usage.cache_miss_tokens == 21
    assert heard.completed.receipt.attempts == 1
