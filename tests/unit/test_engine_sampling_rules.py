import math
from dataclasses import replace

import pytest

from tidemill.engine.logprobs import MAX_SCORED_PROMPT_TOKENS
from tidemill.engine.sampling import SamplingParams
from tidemill.engine.sampling_rules import sampling_violations
from tidemill.engine.sequence import Sequence

EVERYTHING = SamplingParams(
    temperature=2.0,
    top_p=0.1,
    top_k=1,
    min_p=1.0,
    seed=2**64 - 1,
    max_tokens=3,
    min_tokens=3,
    repetition_penalty=0.1,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    logit_bias=((0, -100.0), (511, 100.0)),
    logprobs=20,
    prompt_logprobs=0,
)


def violated(params: SamplingParams, *, num_prompt: int = 4, num_relayed: int = 0) -> list[str]:
    seq = Sequence("s", [1] * num_prompt, sampling=params, num_relayed_tokens=num_relayed)
    return [field for field, _ in sampling_violations(seq, vocab_size=512)]


def test_everything_at_its_bounds_is_taken() -> None:
    assert violated(SamplingParams()) == []
    assert violated(EVERYTHING) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 4),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -math.inf),
        ("logit_bias", ((512, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", ((1, 1.0), (1, 2.0))),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
    ],
)
def test_each_bad_field_is_named(field: str, value: object) -> None:
    assert violated(replace(EVERYTHING, **{field: value})) == [f"sampling.{field}"]  # type: ignore[arg-type]  # wrong on purpose


def test_min_tokens_counts_what_earlier_attempts_relayed() -> None:
    params = SamplingParams(max_tokens=3, min_tokens=5)
    assert violated(params, num_relayed=2) == []
    assert violated(params, num_relayed=1) == ["sampling.min_tokens"]


def test_a_prompt_holds_more_than_what_was_relayed() -> None:
    assert violated(SamplingParams(), num_prompt=4, num_relayed=4) == ["num_relayed_tokens"]
    assert violated(SamplingParams(), num_prompt=4, num_relayed=-1) == ["num_relayed_tokens"]


def test_long_prompts_are_not_scored() -> None:
    params = SamplingParams(prompt_logprobs=1)
    longest = MAX_SCORED_PROMPT_TOKENS
    assert violated(params, num_prompt=longest) == []
    assert violated(params, num_prompt=longest + 1) == ["sampling.prompt_logprobs"]
