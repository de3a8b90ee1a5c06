import random

import pytest

from tests.hashing_runner import HashingBench
from tidemill.engine import SamplingParams, Sequence, StepCost
from tidemill.engine.scheduler import PrefillChunk, Step
from tidemill.models.parameters import num_active_parameters, num_parameters
from tidemill.models.presets import load_preset

V3 = load_preset("deepseek-v3")
LAYERS, HEADS = 61, 128
EMBEDDING = 129_280 * 7168
LATENT_BYTES = 70_272  # of one token in bf16


def sequence(num_tokens: int, **sampling: int) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=8, **sampling)  # type: ignore[arg-type]
    return Sequence("s", [0] * num_tokens, sampling=params)


def chunk(start: int, end: int, *, of: int = 100_000, **sampling: int) -> PrefillChunk:
    return PrefillChunk(sequence(of, **sampling), start, end)


def flops(step: Step) -> list[int]:
    return StepCost(V3, value_bytes=2, flops_per_byte=0)(step)


def bytes_read(step: Step) -> list[int]:
    with_bytes = StepCost(V3, value_bytes=2, flops_per_byte=1)(step)
    return [each - computed for each, computed in zip(with_bytes, flops(step), strict=True)]


def test_a_token_is_multiplied_with_the_active_parameters() -> None:
    pairs = 2 * LAYERS * HEADS * (576 + 512)
    assert flops(Step([sequence(1)])) == [2 * num_active_parameters(V3) + pairs]
    assert flops(Step([sequence(1001)])) == [2 * num_active_parameters(V3) + 1001 * pairs]


def test_a_chunk_attends_to_what_precedes_each_of_its_tokens() -> None:
    pairs = 2 * LAYERS * HEADS * (192 + 128)
    expansion = 2 * LAYERS * 512 * HEADS * (128 + 128)  # of the context's latents, each step anew
    token = 2 * (num_active_parameters(V3) - EMBEDDING) - expansion
    for start, end in ((0, 3), (100, 103)):
        attended = sum(range(start + 1, end + 1))
        expected = 3 * token + attended * pairs + end * expansion
        assert flops(Step(chunks=[chunk(start, end)])) == [expected]


def test_logits_are_paid_for_by_whom_they_are_computed_for() -> None:
    (middle, last, scored) = flops(
        Step(chunks=[chunk(0, 64), chunk(0, 64, of=64), chunk(0, 64, prompt_logprobs=0)])
    )
    assert last - middle == 2 * EMBEDDING
    assert scored - middle == 64 * 2 * EMBEDDING


def test_a_phase_reads_every_weight_once_and_its_latents() -> None:
    weights = 2 * (num_parameters(V3) - EMBEDDING)
    (read,) = bytes_read(Step(chunks=[chunk(0, 50_000)]))
    assert read == pytest.approx(weights + 50_000 * LATENT_BYTES, abs=50_000)
    each = bytes_read(Step([sequence(1000) for _ in range(4000)]))
    assert each[0] == pytest.approx(weights / 4000 + 1000 * LATENT_BYTES, rel=1e-6)


def test_few_tokens_read_the_experts_that_they_choose() -> None:
    (alone,) = bytes_read(Step([sequence(1)]))
    assert alone == pytest.approx(2 * num_active_parameters(V3) + LATENT_BYTES, rel=1e-6)
    two = sum(bytes_read(Step([sequence(1), sequence(1)])))
    assert 1.5 * alone < two < 2 * alone


def test_each_phase_weighs_what_it_would_alone_so_that_both_save_in_a_joint_step() -> None:
    cost = StepCost(V3, value_bytes=2)
    decodes, chunks = [sequence(500), sequence(70)], [chunk(0, 400), chunk(64, 100)]
    assert cost(Step(decodes, chunks)) == cost(Step(decodes)) + cost(Step(chunks=chunks))


@pytest.mark.parametrize("seed", range(5))
def test_the_shares_of_all_sequences_are_the_steps_time_to_the_nanosecond(seed: int) -> None:
    rng = random.Random(seed)
    bench = HashingBench(num_blocks=40, swap_blocks=40)
    for number in range(8):
        length, tokens = rng.randint(1, 150), rng.randint(1, 60)
        bench.submit(f"s{number}", length, tokens, forks=number % 3 == 0)
        bench.step(rng.randint(1, 8))
        if number % 2:
            bench.engine.stop(f"s{number}", "cancelled")
    while bench.engine.has_work:
        bench.step()
    seqs = list(bench.seqs.values())
    assert sum(seq.prefill_ns for seq in seqs) == bench.engine.busy.prefill_ns > 0
    assert sum(seq.decode_ns for seq in seqs) == bench.engine.busy.decode_ns > 0


def test_a_step_that_computes_nothing_is_not_busy() -> None:
    bench = HashingBench(num_blocks=8, swap_blocks=8)
    bench.submit("s", 10, 5, funded=1)
    bench.step()
    before = bench.engine.busy
    bench.engine.stop("s", "cancelled")
    bench.step()
    assert bench.engine.busy == before
