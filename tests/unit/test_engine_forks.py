"""Several completions of one prompt: computed once, shared, copied on the first write."""

import pytest

from tests.engine_harness import finish_of, generated
from tests.hashing_runner import ROOT, HashingBench, undisturbed
from tidemill.engine import FinishedOutput, PrefilledOutput, SamplingParams, Sequence
from tidemill.errors import AlreadyExists, InvalidRequest


def test_choices_share_the_prompt_and_copy_only_its_last_part() -> None:
    bench = HashingBench(num_blocks=16, swap_blocks=0)
    bench.submit("s", 100, 20, forks=3)
    bench.step()
    assert bench.engine.pool.num_referenced == 2
    bench.step()
    assert bench.engine.pool.num_referenced == 1 + 4
    tables = [seq.block_table for seq in bench.seqs.values()]
    assert len({table[0] for table in tables}) == 1
    assert len({table[1] for table in tables}) == 4
    bench.run()
    chunks = [chunk for step in bench.runner.steps for chunk in step.chunks]
    assert [chunk.num_tokens for chunk in chunks] == [100]


def test_first_tokens_of_all_choices_come_with_the_prefill() -> None:
    bench = HashingBench(num_blocks=8, swap_blocks=0)
    bench.submit("s", 64, 2, forks=3)
    bench.step()
    (prefilled,) = [each for each in bench.outputs if isinstance(each, PrefilledOutput)]
    firsts = [drawn.token_id for drawn in prefilled.first_tokens]
    assert firsts == [undisturbed(seq, 1)[0] for seq in bench.seqs.values()]
    assert len(set(firsts)) > 1
    assert prefilled.first_token_id == firsts[0]
    bench.run()


@pytest.mark.parametrize("length", [1, 63, 64, 65, 128])
def test_choices_of_a_prompt_that_was_prefilled_elsewhere(length: int) -> None:
    bench = HashingBench(num_blocks=16, swap_blocks=0)
    bench.submit("s", length, 70, forks=2, handed_over=True)
    bench.run()
    for seq in bench.seqs.values():
        assert seq.num_generated == 70
    assert bench.runner.steps[0].num_tokens == 3


def test_choices_of_a_prefill_for_others_draw_their_first_tokens_and_no_more() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=0)
    prompt = list(range(20))
    forks = [Sequence(f"f{n}", prompt, sampling=SamplingParams(seed=n), root=ROOT) for n in (1, 2)]
    parent = Sequence(
        "p",
        prompt,
        block_table=bench.engine.pool.allocate(1),
        sampling=SamplingParams(),
        prefill_only=True,
        root=ROOT,
        forks=forks,
    )
    bench.engine.submit(parent)
    (prefilled,) = bench.engine.step()
    assert isinstance(prefilled, PrefilledOutput)
    firsts = [drawn.token_id for drawn in prefilled.first_tokens]
    assert firsts == [undisturbed(seq, 1)[0] for seq in (parent, *forks)]
    assert not bench.engine.has_work
    bench.engine.pool.release(parent.block_table)
    bench.engine.check_idle()


def test_each_choice_ends_by_itself_and_the_first_may_end_first() -> None:
    bench = HashingBench(num_blocks=16, swap_blocks=0)
    bench.submit("s", 100, 60, forks=2)
    bench.step(5)
    bench.engine.stop("s", "cancelled")
    bench.step()
    assert finish_of(bench.outputs, "s").num_generated == 5
    assert not bench.engine.admit("x", 700, 1000)
    bench.run()
    assert [len(generated(bench.outputs, name)) for name in ("s1", "s2")] == [60, 60]


def test_each_choice_is_funded_by_itself() -> None:
    bench = HashingBench(num_blocks=16, swap_blocks=0)
    bench.submit("s", 10, 8, forks=1, funded=2)
    bench.step(4)
    assert not bench.engine.has_work
    bench.engine.fund("s1", 8)
    bench.step(10)
    assert [len(generated(bench.outputs, name)) for name in ("s", "s1")] == [2, 8]
    bench.engine.fund("s", 8)
    bench.run()


def test_a_choice_stopped_before_its_prompt_is_computed_ends_with_it_and_hurts_no_other() -> None:
    bench = HashingBench(num_blocks=8, swap_blocks=0, step_tokens=32)
    bench.submit("s", 100, 10, forks=1)
    bench.step()
    bench.engine.stop("s", "cancelled")
    bench.step(4)
    assert finish_of(bench.outputs, "s").num_generated == 1
    bench.run()
    assert finish_of(bench.outputs, "s1").reason == "length"


def test_a_prompt_whose_choices_are_all_stopped_is_computed_no_further() -> None:
    bench = HashingBench(num_blocks=8, swap_blocks=0, step_tokens=32)
    seq = bench.submit("s", 100, 10, forks=1)
    bench.step()
    bench.engine.stop("s", "cancelled")
    bench.engine.stop("s1", "cancelled")
    bench.step()
    assert seq.num_computed_tokens == 32
    assert {each.seq_id for each in bench.outputs if isinstance(each, FinishedOutput)} == {
        "s",
        "s1",
    }
    bench.run()


def test_a_shared_part_is_left_to_the_swapped_where_no_block_is_free_for_a_copy() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=4)
    first = bench.submit("s", 10, 20, forks=1)
    bench.step()
    others = bench.engine.pool.allocate(3)
    bench.step(3)
    assert bench.engine.num_swapped == 1
    assert first.num_generated == 4
    bench.engine.pool.release(others)
    bench.run()


def test_choices_that_are_swapped_out_together_come_back_sharing() -> None:
    bench = HashingBench(num_blocks=7, swap_blocks=12)
    bench.submit("old", 60, 380)
    bench.step()
    bench.submit("s", 130, 200, forks=1)
    bench.until_swapped(2)
    while bench.engine._tables.swap.num_used < 5:  # two shared, and what is each one's own
        bench.step()
    while bench.engine.num_swapped:
        bench.step()
    tables = [bench.seqs[name].block_table for name in ("s", "s1")]
    assert tables[0][:2] == tables[1][:2]
    assert [bench.engine.pool.num_holders(block) for block in tables[0][:2]] == [2, 2]
    bench.run()


def test_the_prompt_of_choices_counts_once_for_admission() -> None:
    bench = HashingBench(num_blocks=10, swap_blocks=0)
    assert bench.engine.could_hold(512, 65, choices=2)
    assert not bench.engine.could_hold(512, 66, choices=2)
    assert bench.engine.admit("s", 512, 65, choices=2)
    assert not bench.engine.admit("t", 1, 1)


def test_forks_that_do_not_fit_their_parent_are_refused() -> None:
    bench = HashingBench(num_blocks=4, swap_blocks=0)

    def submit(*forks: Sequence) -> None:
        parent = Sequence("s", [1, 2], block_table=[0], sampling=SamplingParams(), forks=forks)
        bench.engine.submit(parent)

    fork = Sequence("f", [1, 3], sampling=SamplingParams())
    with pytest.raises(InvalidRequest, match="another prompt"):
        submit(fork)
    with pytest.raises(InvalidRequest, match="first token"):
        submit(Sequence("f", [1, 2], sampling=SamplingParams(), first_token_id=4))
    with pytest.raises(InvalidRequest, match="of its own"):
        submit(Sequence("f", [1, 2], sampling=SamplingParams(), block_table=[1]))
    with pytest.raises(AlreadyExists):
        submit(Sequence("s", [1, 2], sampling=SamplingParams()))
    assert not bench.engine.has_work
