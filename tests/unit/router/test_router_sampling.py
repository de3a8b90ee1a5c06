"""Defaults and bounds that need a model larger than the scripted one."""

from pathlib import Path
from typing import Any, cast

import pytest

from services.router.config import ModelConfig
from services.router.models import ServedModel
from services.router.sampling import Sampling, Wanted, resolve
from tidemill.errors import InvalidRequest
from tidemill.text import SamplingDefaults, Tokenizer


class Vocabulary:
    """As much of a tokeniser as resolving needs."""

    eos_ids = frozenset({1, 2})
    defaults = SamplingDefaults(
        temperature=0.3, top_p=0.8, top_k=40, min_p=0.05, repetition_penalty=1.1
    )


def resolved(wanted: Wanted, *, num_prompt_tokens: int = 100) -> Sampling:
    config = ModelConfig(
        name="m", path=Path("m"), price_model="p", max_output_tokens=131_072, default_max_tokens=512
    )
    model = ServedModel(config, cast(Tokenizer, Vocabulary()))
    return resolve(
        wanted, model, num_prompt_tokens=num_prompt_tokens, context_tokens=163_840, seed=7
    )


def test_what_is_left_out_is_what_the_models_folder_advises() -> None:
    found = resolved(Wanted())
    assert (found.temperature, found.top_p, found.top_k) == (0.3, 0.8, 40)
    assert (found.min_p, found.repetition_penalty) == (0.05, 1.1)
    assert (found.seed, found.max_tokens, found.stop_token_ids) == (7, 512, (1, 2))


def test_what_is_given_counts_though_it_is_zero() -> None:
    given: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 0}
    found = resolved(Wanted(**given, repetition_penalty=1.0))
    assert {name: getattr(found, name) for name in given} == given
    assert found.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("wanted", "num_prompt_tokens", "field"),
    [
        (Wanted(n=16, max_tokens=65_537), 100, "sampling.n"),
        (Wanted(prompt_logprobs=0), 8193, "sampling.prompt_logprobs"),
        (Wanted(max_tokens=131_073), 100, "sampling.max_tokens"),
        (Wanted(min_tokens=513), 100, "sampling.min_tokens"),
        (Wanted(stop_token_ids=tuple(range(3, 131))), 100, "sampling.stop_token_ids"),
    ],
)
def test_bounds_that_depend_on_each_other_name_the_field(
    wanted: Wanted, num_prompt_tokens: int, field: str
) -> None:
    with pytest.raises(InvalidRequest) as raised:
        resolved(wanted, num_prompt_tokens=num_prompt_tokens)
    assert [path for path, _ in raised.value.violations] == [field]


def test_what_just_fits_is_let_in() -> None:
    assert resolved(Wanted(n=16, max_tokens=65_536)).n == 16
    assert resolved(Wanted(prompt_logprobs=0), num_prompt_tokens=8192).prompt_logprobs == 0
    assert resolved(Wanted(min_tokens=512)).min_tokens == 512
