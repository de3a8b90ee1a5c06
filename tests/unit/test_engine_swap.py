"""What happens when blocks run out, on an engine whose next token is a hash of its latents."""

import pytest
import torch

from tests.engine_harness import finish_of, generated
from tests.hashing_runner import HashingBench
from tidemill.engine import FinishedOutput
from tidemill.errors import PoolExhausted


def test_the_youngest_leaves_and_the_oldest_never_misses_a_step() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=8)
    old, young = bench.submit("old", 60, 190), bench.submit("young", 60, 190)
    bench.until_swapped()
    assert young.block_table == []
    while not any(isinstance(output, FinishedOutput) for output in bench.outputs):
        bench.step()
        assert old in bench.runner.steps[-1].decodes
    bench.run()


def test_what_comes_back_is_bitwise_what_left() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=8)
    bench.submit("old", 60, 150)
    young = bench.submit("young", 60, 150)
    latents = bench.engine.pool.latents[0]
    while not bench.engine.num_swapped:
        left = latents[young.block_table].flatten()[: young.num_computed_tokens]
        bench.step()
    while bench.engine.num_swapped:
        bench.step()
    assert young.num_computed_tokens == len(left) + 1
    assert torch.equal(latents[young.block_table].flatten()[: len(left)], left)
    bench.run()


def test_nothing_is_admitted_while_a_sequence_is_swapped_out_nor_beyond_pool_and_swap() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=4)
    engine = bench.engine
    assert not engine.could_hold(100, 200)
    assert engine.could_hold(100, 150)
    bench.submit("a", 60, 150)
    assert engine.admit("b", 60, 150)
    assert not engine.admit("c", 60, 150)
    with pytest.raises(PoolExhausted, match="promised"):
        bench.submit("c", 60, 150)
    engine.dismiss("b")
    assert engine.admit("c", 60, 150)
    bench.submit("c", 60, 150)
    bench.until_swapped()
    assert not engine.admit("d", 1, 1)
    bench.run()
    assert engine.admit("d", 1, 1)
    engine.dismiss("d")


def test_paused_sequences_make_way_and_return_in_exchange_when_pool_and_swap_are_full() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=2)
    paused = bench.submit("paused", 100, 28, funded=1)
    bench.submit("running", 100, 150)
    bench.step(120)
    assert bench.engine._tables.swap.num_used == 2
    assert bench.engine.pool.num_free == 0
    bench.engine.fund("paused", 28)
    bench.step()
    assert bench.runner.steps[-1].decodes == [paused]
    assert bench.engine._tables.swap.num_used == 2
    bench.run()


def test_an_older_sequence_without_funds_makes_way_for_a_swapped_one() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=8)
    bench.submit("old", 60, 190, funded=75)
    bench.submit("young", 60, 150)
    bench.until_swapped()
    while bench.engine.has_work:
        bench.step()
    assert finish_of(bench.outputs, "young").num_generated == 150
    assert len(generated(bench.outputs, "old")) == 75
    bench.engine.fund("old", 190)
    bench.run()


def test_a_stopped_sequence_frees_what_it_has_on_both_sides() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=8)
    bench.submit("old", 60, 190)
    bench.submit("young", 60, 190)
    bench.until_swapped()
    assert bench.engine._tables.swap.num_used == 1
    assert bench.engine.pool.num_referenced == 4
    bench.engine.stop("young", "cancelled")
    bench.step()
    assert finish_of(bench.outputs, "young").reason == "cancelled"
    assert bench.engine._tables.swap.num_used == 0
    bench.run()


def test_a_sequence_may_be_stopped_wherever_it_is() -> None:
    bench = HashingBench(num_blocks=9, swap_blocks=9, step_tokens=4)
    bench.submit("paused", 10, 100, funded=1)
    bench.submit("forked", 70, 180, forks=1)
    bench.step(30)
    prefilling = bench.submit("prefilling", 250, 5)
    bench.until_swapped()
    assert prefilling.num_uncomputed_prompt_tokens
    assert bench.engine.load_snapshot().swapped == 1
    for seq_id in ("paused", "prefilling", "forked1"):
        bench.engine.stop(seq_id, "cancelled")
    bench.step()
    assert bench.engine.num_swapped == 0
    assert sorted(o.seq_id for o in bench.outputs if isinstance(o, FinishedOutput)) == [
        "forked1",
        "paused",
        "prefilling",
    ]
    bench.run()
    assert finish_of(bench.outputs, "forked").reason == "length"


def test_a_prompt_that_is_swapped_out_half_computed_goes_on_where_it_was() -> None:
    bench = HashingBench(num_blocks=5, swap_blocks=5, step_tokens=9)
    bench.submit("running", 60, 100)
    bench.step(8)
    prompt = bench.submit("prompt", 250, 3)
    bench.until_swapped()
    computed = prompt.num_computed_tokens
    assert 0 < computed < 250
    assert bench.engine.load_snapshot().queued_prefill_tokens == 0
    bench.run()
    assert prompt.num_computed_tokens >= 250
    chunks = [chunk for step in bench.runner.steps for chunk in step.chunks if chunk.seq is prompt]
    assert sum(chunk.num_tokens for chunk in chunks) == 250


def test_without_swap_space_what_is_admitted_together_fits_the_pool() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=0)
    with pytest.raises(PoolExhausted, match="0 to swap"):
        bench.submit("c", 60, 300)
    bench.submit("a", 60, 60)
    bench.submit("b", 60, 60)
    bench.run()


def test_blocks_held_by_others_make_sequences_wait_and_never_fail() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=4)
    bench.submit("a", 60, 100)
    others = bench.engine.pool.allocate(3)
    bench.step(30)
    assert bench.engine.starved
    assert len(generated(bench.outputs, "a")) == 5
    bench.engine.pool.release(others)
    bench.run()


def test_an_end_starves_nobody_though_its_blocks_come_free_only_once_it_is_heard() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=8)
    old, young = bench.submit("old", 60, 190), bench.submit("young", 60, 190)
    while len(old.block_table) < 4:
        bench.step()
    assert bench.engine._tables.is_swapped(young)
    num_steps = len(bench.runner.steps)
    bench.engine.stop("old", "cancelled")
    (end,) = bench.engine.step()
    assert isinstance(end, FinishedOutput)
    assert len(bench.runner.steps) == num_steps
    assert not bench.engine.starved
    bench.outputs.append(end)
    bench.engine.pool.release(old.block_table)
    bench.run()


def test_a_sequence_that_cannot_go_on_stays_swapped_out_until_it_can() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=0)
    bench.submit("old", 60, 60, funded=1)
    waiting = bench.submit("waiting", 60, 60)
    others = bench.engine.pool.allocate(2)
    bench.step(10)
    assert bench.engine.starved
    assert bench.engine._tables.is_swapped(waiting)
    assert not bench.engine._tables.fits(waiting, headroom=0)
    bench.engine.pool.release(others)
    bench.engine.fund("old", 60)
    bench.run()


def test_prompts_get_at_least_one_token_of_every_step() -> None:
    bench = HashingBench(num_blocks=8, swap_blocks=0, step_tokens=2)
    for name in ("a", "b", "c"):
        bench.submit(name, 1, 50)
    bench.step(3)
    prompt = bench.submit("prompt", 20, 1)
    bench.step(20)
    assert prompt.num_computed_tokens == 20
    bench.run()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 639])
def test_sequences_of_one_token_to_the_whole_context(length: int) -> None:
    bench = HashingBench(num_blocks=10, swap_blocks=0)
    bench.submit("s", length, 640)
    bench.run()
    assert finish_of(bench.outputs, "s").num_generated == 640 - length
