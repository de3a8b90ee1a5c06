"""A prompt that is held to its last token: one row is computed, and nothing held is written."""

from pathlib import Path

import pytest
import torch

from tests.engine_harness import (
    commit_prompt,
    generated,
    load_engine,
    make_sequence,
    make_sequence_with_reuse,
    run_all,
    run_sequence,
)
from tests.hashing_runner import ROOT, blocks_up_to, hashing_engine, undisturbed
from tests.tiny_model import make_tiny_checkpoint
from tidemill.blocks import chain_hashes
from tidemill.engine import Engine, SamplingParams, Sequence

PROMPT = [position * 7 % 400 + 6 for position in range(128)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(model_dir: Path) -> Engine:
    return load_engine(model_dir)


def hold(engine: Engine, prompt: list[int]) -> tuple[list[int], list[int]]:
    """Compute and commit a prompt; what it answered, and its blocks."""
    first = make_sequence(engine, "first", prompt)
    engine.submit(first)
    outputs = run_all(engine)
    commit_prompt(engine, first)
    blocks = first.block_table[: len(prompt) // 64]
    engine.pool.release(first.block_table)
    return generated(outputs, "first"), blocks


def test_only_the_last_token_is_computed_and_the_answer_is_the_same(engine: Engine) -> None:
    tokens, _ = hold(engine, PROMPT)
    again = make_sequence_with_reuse(engine, "again", PROMPT)
    computed: list[tuple[int, int, int]] = []
    again.on_layer = lambda *layer: computed.append(layer)
    assert again.num_cached_tokens == 128
    assert run_sequence(engine, again) == tokens
    assert computed == [(layer, 127, 128) for layer in range(3)]
    engine.pool.check_idle()


def test_the_shared_block_is_never_written_over(engine: Engine) -> None:
    """Its last latent is made to differ by a hair, so that writing it again would show."""
    _, blocks = hold(engine, PROMPT)
    engine.pool.latents[:, blocks[-1], 63] += 2.0**-12
    marked = engine.pool.latents[:, blocks].clone()
    again = make_sequence_with_reuse(engine, "again", PROMPT)
    assert again.block_table[:2] == blocks
    beside = make_sequence(engine, "beside", PROMPT[:100])  # whose rows are written, in one batch
    engine.submit(again)
    engine.submit(beside)
    outputs = run_all(engine)
    assert torch.equal(engine.pool.latents[:, blocks], marked)
    engine.pool.release(again.block_table)
    engine.pool.release(beside.block_table)
    alone = make_sequence(engine, "alone", PROMPT[:100])
    assert run_sequence(engine, alone) == generated(outputs, "beside")


def test_two_may_read_the_same_last_block_at_once(engine: Engine) -> None:
    tokens, blocks = hold(engine, PROMPT)
    seqs = [make_sequence_with_reuse(engine, name, PROMPT) for name in ("a", "b")]
    for seq in seqs:
        engine.submit(seq)
    outputs = run_all(engine)
    for seq in seqs:
        assert seq.block_table[:2] == blocks
        assert generated(outputs, seq.seq_id) == tokens
        engine.pool.release(seq.block_table)
    engine.pool.check_idle()


@pytest.mark.parametrize("swap_blocks", [0, 8])
def test_it_takes_no_more_blocks_than_the_prompt_has(swap_blocks: int) -> None:
    """A full pool holds it: nothing is copied, promised or swapped for its last token."""
    engine, runner = hashing_engine(num_blocks=3, swap_blocks=swap_blocks)
    prompt = [position % 24 for position in range(128)]
    sampling = SamplingParams(max_tokens=40)
    answers: list[list[int]] = []
    for name in ("first", "again"):
        assert engine.admit(name, len(prompt), sampling.max_tokens)
        claimed = engine.pool.claim(chain_hashes(ROOT, prompt))
        table = claimed + engine.pool.allocate(2 - len(claimed))
        seq = Sequence(
            name,
            prompt,
            block_table=table,
            sampling=sampling,
            num_cached_tokens=64 * len(claimed),
            root=ROOT,
        )
        runner.steps.clear()
        engine.submit(seq)
        answers.append(generated(run_all(engine), name))
        assert len(seq.block_table) == blocks_up_to(128 + 39)
        engine.pool.release(seq.block_table)
        assert answers[-1] == undisturbed(seq, 40)
    assert [chunk.num_tokens for step in runner.steps for chunk in step.chunks] == [1]
    engine.check_idle()
