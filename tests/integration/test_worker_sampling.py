"""Sampling, log-probabilities and grammars through real workers, prefill and decode apart."""

import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.worker_harness import (
    Answer,
    RouterSide,
    Tls,
    make_start,
    prompt_of,
    router_of,
    settled,
    worker_at,
)
from tidemill.api.common.v1.lifecycle_pb2 import Grammar
from tidemill.engine.logprobs import MAX_SCORED_PROMPT_TOKENS
from tidemill.errors import FailedPrecondition, InvalidRequest
from tidemill.vocabulary import load_token_bytes, vocabulary_digest
from tidemill.worker.config import Role
from tidemill.worker.process import RunningWorker

EOS = 1
PROMPT = prompt_of(150)
# Every rule at once: what one worker draws the other must go on with.
EVERY_RULE: dict[str, Any] = {
    "temperature": 1.1,
    "seed": 77,
    "top_k": 200,
    "min_p": 0.001,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.3,
    "logit_bias": {40: 3.0, 41: -100.0},
    "min_tokens": 6,
    "stop_token_ids": [EOS, 40],
    "max_tokens": 12,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["sure", "count", "mood"],
    "additionalProperties": False,
}


@dataclass
class Pools:
    """A prefill and a decode worker, and a router's channel to the latter."""

    prefill: RunningWorker
    decode: RunningWorker
    router: RouterSide

    async def ask(self, token_ids: list[int], *, split: bool, **fields: Any) -> Answer:
        """Run an attempt of a request of its own, and see that it leaves nothing behind."""
        prefill = self.prefill if split else None
        request_id = uuid.uuid4().hex
        answer = await self.router.ask(make_start(token_ids, request_id, prefill=prefill, **fields))
        await settled(self.prefill, self.decode)
        return answer


# Each worker's grammar compiler takes seconds to start: the tests share one pair, and its loop.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pools(model_dir: Path, tls_files: Tls) -> AsyncIterator[Pools]:
    tls = tls_files
    async with (
        worker_at(Role.PREFILL, model_dir, tls) as prefill,
        worker_at(Role.DECODE, model_dir, tls, in_place_tokens=10_000) as decode,
        router_of(decode, tls) as router,
    ):
        yield Pools(prefill, decode, router)


def text_of(model_dir: Path, token_ids: list[int]) -> str:
    token_bytes = load_token_bytes(model_dir)
    return b"".join(token_bytes[token_id] for token_id in token_ids).decode()


def grammar_of(model_dir: Path, schema: dict[str, Any] | None) -> Grammar:
    grammar = Grammar(vocabulary_digest=vocabulary_digest(load_token_bytes(model_dir)))
    if schema is None:
        grammar.json_object.SetInParent()
    else:
        grammar.json_schema.schema = json.dumps(schema)
    return grammar


async def test_x2_every_rule_draws_the_same_split_in_place_and_after_a_failover(
    pools: Pools, model_dir: Path
) -> None:
    split = await pools.ask(PROMPT, split=True, **EVERY_RULE)
    placed = await pools.ask(PROMPT, split=False, **EVERY_RULE)
    resumed = [
        await pools.ask(
            PROMPT + split.tokens[:relayed],
            split=in_split,
            relayed_tokens=relayed,
            **EVERY_RULE,
        )
        for relayed, in_split in ((3, True), (5, False))
    ]
    assert split.error is None
    assert split.tokens == placed.tokens
    assert not {EOS, 40} & set(split.tokens[:6])
    assert 41 not in split.tokens
    assert [answer.tokens for answer in resumed] == [split.tokens[3:], split.tokens[5:]]


async def test_log_probabilities_reach_the_router_by_both_paths(
    pools: Pools, model_dir: Path
) -> None:
    asked = {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 5}
    split = await pools.ask(PROMPT, split=True, **asked)
    placed = await pools.ask(PROMPT, split=False, **asked)
    again = await pools.ask(PROMPT, split=True, **asked)
    plain = await pools.ask(PROMPT, split=True, max_tokens=5)
    for answer in (split, placed, again):
        assert answer.done is not None
        assert len(answer.logprobs) == len(answer.tokens) == 5
        for one, token_id in zip(answer.logprobs, answer.tokens, strict=True):
            assert one.top_token_ids[0] == token_id  # greedy takes the likeliest
            assert one.top_logprobs[0] == one.logprob
            assert len(one.top_token_ids) == len(one.top_logprobs) == 3
        assert len(answer.done.prompt_logprobs) == len(PROMPT) - 1
        assert answer.usage.computed_tokens == len(PROMPT)
    assert split.done is not None
    assert placed.done is not None
    for one, other in zip(split.done.prompt_logprobs, placed.done.prompt_logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
        assert len(one.top_token_ids) == 2
    assert plain.done is not None
    assert not plain.logprobs
    assert not plain.done.first_logprobs
    assert not plain.done.prompt_logprobs
    assert plain.usage.computed_tokens < len(PROMPT)  # a scored prompt may be reused by others


async def test_scores_of_a_prompt_are_bounded_by_its_length() -> None:
    # 20 alternatives, and ids of a vocabulary of 129,280, in a message that holds 8 MiB.
    assert MAX_SCORED_PROMPT_TOKENS * 160 < (8 << 20) // 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_an_answer_fits_its_schema_by_both_paths_and_after_a_failover(
    pools: Pools, model_dir: Path, temperature: float
) -> None:
    asked = {
        "grammar": grammar_of(model_dir, SCHEMA),
        "temperature": temperature,
        "seed": 5,
        "max_tokens": 400,
        "stop_token_ids": [EOS],
    }
    split = await pools.ask(PROMPT, split=True, **asked)
    placed = await pools.ask(PROMPT, split=False, **asked)
    resumed = await pools.ask(
        PROMPT + split.tokens[:7],
        split=True,
        relayed_tokens=7,
        **asked,
    )
    assert split.reason == "STOP"
    value = json.loads(text_of(model_dir, split.tokens))
    assert list(value) == ["sure", "count", "mood"]
    assert 0 <= value["count"] <= 99
    assert split.tokens == placed.tokens
    assert resumed.tokens == split.tokens[7:]


async def test_choices_each_follow_the_grammar_on_their_own(pools: Pools, model_dir: Path) -> None:
    answer = await pools.ask(
        PROMPT,
        split=True,
        grammar=grammar_of(model_dir, SCHEMA),
        temperature=1.0,
        seed=6,
        max_tokens=300,
        stop_token_ids=[EOS],
        n=3,
    )
    assert len(answer.choices) == 3
    values = [json.loads(text_of(model_dir, tokens)) for tokens in answer.choices]
    assert all(list(value) == ["sure", "count", "mood"] for value in values)
    assert len({tuple(tokens) for tokens in answer.choices}) > 1


async def test_a_bad_grammar_is_refused_before_anything_is_taken(
    pools: Pools, model_dir: Path
) -> None:
    bad = grammar_of(model_dir, {"type": "integer", "minimum": 5, "maximum": 3})
    foreign = grammar_of(model_dir, None)
    foreign.vocabulary_digest = b"x" * 32
    refused = await pools.ask(PROMPT, split=True, grammar=bad)
    mismatch = await pools.ask(PROMPT, split=False, grammar=foreign)
    assert isinstance(refused.error, InvalidRequest)
    assert refused.error.reason == "GRAMMAR_INVALID"
    assert [field for field, _ in refused.error.violations] == [
        "response_format.json_schema.schema"
    ]
    assert isinstance(mismatch.error, FailedPrecondition)
    assert mismatch.error.reason == "VOCABULARY_MISMATCH"
    assert refused.events == mismatch.events == []


@pytest.mark.parametrize("split", [True, False])
async def test_a_dead_end_ends_with_an_error_and_frees_all(
    pools: Pools, model_dir: Path, split: bool
) -> None:
    answer = await pools.ask(
        PROMPT,
        split=split,
        grammar=grammar_of(model_dir, {"type": "boolean"}),
        max_tokens=60,
        min_tokens=50,
        stop_token_ids=[EOS],
    )
    assert answer.reason == "SERVER_FAULT"
    assert isinstance(answer.error, FailedPrecondition)
    assert answer.error.reason == "GRAMMAR_DEAD_END"
    assert text_of(model_dir, answer.tokens) in {"true", "false"}
    assert answer.final.generated_tokens == len(answer.tokens)


@pytest.mark.parametrize("split", [True, False])
async def test_a_dead_end_at_the_first_token_is_one_too(
    pools: Pools, model_dir: Path, split: bool
) -> None:
    answer = await pools.ask(
        [*PROMPT, 300],
        split=split,
        grammar=grammar_of(model_dir, {"type": "boolean"}),
        stop_token_ids=[EOS],
        relayed_tokens=1,
    )
    assert isinstance(answer.error, FailedPrecondition)
    assert answer.error.reason == "GRAMMAR_DEAD_END"
    assert answer.tokens == []


async def test_a_router_whose_counts_differ_is_refused(pools: Pools) -> None:
    start = make_start(PROMPT, relayed_tokens=3)
    start.task.relayed_tokens = 0
    answer = await pools.router.ask(start)
    assert isinstance(answer.error, InvalidRequest)
    assert [field for field, _ in answer.error.violations] == ["task.relayed_tokens"]
