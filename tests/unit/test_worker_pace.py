"""A worker's pace is what its steps took, whatever they computed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tidemill.engine import Engine, SamplingParams, Sequence, StepCost
from tidemill.engine.scheduler import PrefillChunk, Step
from tidemill.models.presets import load_preset
from tidemill.worker.pace import Pace

COST = StepCost(load_preset("deepseek-v3"), value_bytes=2, flops_per_byte=300)


class Steps:
    """A pace that is told of steps, one after another."""

    def __init__(self, cost: Callable[[Step], list[int]] = COST) -> None:
        self.cost = cost
        self.now = 0.0
        self.decoded: list[float] = []
        engine: Any = SimpleNamespace(cost=cost)
        self.pace = Pace(cast(Engine, engine), on_decode_step=self.decoded.append)

    def took(
        self, seconds: float, *, decodes: int = 0, chunk: tuple[int, int] | None = None
    ) -> None:
        self.now += seconds
        chunks = [PrefillChunk(sequence(4096), *chunk)] if chunk else []
        step = Step([sequence(1000)] * decodes, chunks)
        self.pace.took(step, self.cost(step), seconds, now=self.now)

    def took_as_modelled(self, flops_per_s: float, *, chunk: tuple[int, int]) -> None:
        step = Step(chunks=[PrefillChunk(sequence(4096), *chunk)])
        self.took(sum(self.cost(step)) / flops_per_s, chunk=chunk)


def sequence(num_tokens: int) -> Sequence:
    return Sequence("s", [0] * num_tokens, sampling=SamplingParams())


def test_a_worker_that_has_computed_nothing_has_no_pace() -> None:
    pace = Steps().pace
    assert (pace.prefill_tokens_per_s, pace.decode_step_us) == (0, 0)


def test_prefill_is_told_in_tokens_of_a_prompt_of_512() -> None:
    steps = Steps()
    steps.took(0.1, chunk=(0, 512))
    assert steps.pace.prefill_tokens_per_s == pytest.approx(5120, rel=0.01)


@pytest.mark.parametrize("chunk", [(0, 16), (0, 100), (3000, 4000)])
def test_short_prompts_and_long_contexts_make_no_worker_look_slow(chunk: tuple[int, int]) -> None:
    steps, other = Steps(), Steps()
    steps.took_as_modelled(1e14, chunk=chunk)
    other.took_as_modelled(1e14, chunk=(0, 512))
    pace = other.pace.prefill_tokens_per_s
    assert steps.pace.prefill_tokens_per_s == pytest.approx(pace, rel=0.01)
    steps.took_as_modelled(1e13, chunk=chunk)
    assert steps.pace.prefill_tokens_per_s < pace / 5


def test_decode_is_the_time_of_a_step_without_its_prompts_part() -> None:
    alone, joint = Steps(), Steps()
    alone.took(0.020, decodes=8)
    assert alone.pace.decode_step_us == 20_000
    joint.took(0.200, decodes=8, chunk=(0, 500))
    assert 0 < joint.pace.decode_step_us < 100_000
    assert joint.pace.prefill_tokens_per_s > 0
    assert (alone.decoded, joint.decoded) == ([0.020], [0.200]), "the metric has the whole step"


def test_the_past_fades_within_seconds_of_new_steps() -> None:
    steps = Steps()
    for _ in range(200):
        steps.took(0.100, decodes=1)
    for _ in range(100):
        steps.took(0.020, decodes=1)
    assert 20_000 < steps.pace.decode_step_us < 80_000
    for _ in range(900):
        steps.took(0.020, decodes=1)
    assert steps.pace.decode_step_us == pytest.approx(20_000, rel=0.05)


def test_an_idle_worker_keeps_its_pace_until_the_next_step() -> None:
    steps = Steps()
    steps.took(0.100, decodes=1)
    assert steps.pace.decode_step_us == 100_000
    steps.now += 1e6
    steps.took(0.020, decodes=1)
    assert steps.pace.decode_step_us == 20_000
