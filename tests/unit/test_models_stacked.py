"""The form that GPUs run: stacked experts, FP8 weights as they are; here on the CPU.

First on the operators' references, then on their Triton kernels in the interpreter.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.engine_harness import generated, make_sequence, run_all
from tests.family import VARIANTS, Variant
from tests.model_probe import Probe
from tidemill.engine import Engine, EngineConfig, SamplingParams
from tidemill.engine.decode_graphs import DecodeGraphs, Recording, graph_sizes
from tidemill.engine.runner import ModelRunner
from tidemill.engine.scheduler import PrefillChunk, Step
from tidemill.kernels import choice
from tidemill.kernels.linear import BlockScaledLinear
from tidemill.models.deepseek import Attention
from tidemill.models.stacked import StackedMoe

# Wide enough for whole blocks of 128 by 128, and small enough for an interpreter.
BLOCKS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "v_head_dim": 32,
    "initializer_range": 0.06,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_hidden_layers": 2,
}
FP8 = Variant("v3", BLOCKS, "fp8")
FP8_HALVES = Variant("v3", {**BLOCKS, "rope_interleave": False}, "fp8")
# What groups of 128 e4m3 activations cost two layers: of the logits' norm, for most tokens. Some
# choose another expert for it.
FP8_TOLERANCE = 0.15
PLAIN_TOLERANCE = 1e-5
ONE_TOKEN = SamplingParams(max_tokens=1)


@pytest.fixture(autouse=True)
def automatic_path() -> Iterator[None]:
    """Engines force the path of their config; the next test starts from "auto" again."""
    with choice.forced("auto"):
        yield


def prompt(length: int) -> Tensor:
    return torch.randint(6, 512, (length,), generator=torch.manual_seed(length))


def error(ours: Tensor, reference: Tensor) -> float:
    """The greatest difference, of the reference's range."""
    return ((ours - reference).abs().max() / (reference.max() - reference.min())).item()


@pytest.mark.parametrize("name", [name for name in VARIANTS if "fp8" not in name])
def test_stacked_experts_give_the_logits_of_single_ones(name: str, tmp_path: Path) -> None:
    VARIANTS[name].make(tmp_path / "model", tmp_path)
    plain = Probe(tmp_path / "model", torch.float32)
    stacked = Probe(tmp_path / "model", torch.float32, stacked=True)
    ids = prompt(70)
    assert error(stacked.prefill(ids), plain.prefill(ids)) < PLAIN_TOLERANCE
    assert error(stacked.absorbed(ids), plain.absorbed(ids)) < PLAIN_TOLERANCE


@pytest.mark.parametrize("variant", [FP8, FP8_HALVES], ids=["pairs", "halves"])
def test_fp8_weights_stay_fp8_and_give_the_logits_but_for_their_activations(
    variant: Variant, tmp_path: Path
) -> None:
    variant.make(tmp_path / "model", tmp_path)
    plain = Probe(tmp_path / "model", torch.float32)
    stacked = Probe(tmp_path / "model", torch.float32, stacked=True)
    attention, moe = stacked.model.layers[1].attention, stacked.model.layers[1].mlp
    assert isinstance(attention, Attention)
    assert isinstance(moe, StackedMoe)
    assert isinstance(attention.qkv_a, BlockScaledLinear)
    assert isinstance(attention.q_b, BlockScaledLinear)
    assert moe.routed.gate_up.dtype == moe.routed.down.dtype == torch.float8_e4m3fn
    ids = prompt(70)
    expected = plain.prefill(ids)
    for form in (stacked.prefill, stacked.absorbed):
        differences = (form(ids) - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert 0 < differences.median().item() < FP8_TOLERANCE


def test_blocks_that_a_stack_would_cut_are_dequantised(tmp_path: Path) -> None:
    VARIANTS["v3_fp8"].make(tmp_path / "model", tmp_path)
    plain = Probe(tmp_path / "model", torch.float32)
    stacked = Probe(tmp_path / "model", torch.float32, stacked=True)
    ids = prompt(9)
    assert error(stacked.prefill(ids), plain.prefill(ids)) < PLAIN_TOLERANCE


INTERPRETED = {
    "v3": Variant("v3", {"num_hidden_layers": 2}),
    "v2_direct_query": VARIANTS["v2_greedy"],
}


@pytest.mark.parametrize("name", INTERPRETED)
def test_kernels_give_the_logits_of_their_references(name: str, tmp_path: Path) -> None:
    INTERPRETED[name].make(tmp_path / "model", tmp_path)
    probe = Probe(tmp_path / "model", torch.float32, stacked=True)
    ids = prompt(5)
    for form in (probe.prefill, probe.absorbed):
        expected = form(ids)
        with choice.forced("triton"):
            assert error(form(ids), expected) < PLAIN_TOLERANCE


def step_of_all_kinds(engine: Engine) -> Step:
    """A decode row, and of three prompts a rest after a prefix, one token, and a first chunk."""
    seqs = {
        length: make_sequence(engine, str(length), prompt(length).tolist(), ONE_TOKEN)
        for length in (67, 5, 128, 9)
    }
    before = [PrefillChunk(seqs[67], 0, 66), PrefillChunk(seqs[5], 0, 2)]
    before += [PrefillChunk(seqs[128], 0, 127)]
    with choice.forced("reference"):
        engine._runner.forward(Step(chunks=before))
    chunks = [PrefillChunk(seqs[5], 2, 5), PrefillChunk(seqs[128], 127, 128)]
    return Step(decodes=[seqs[67]], chunks=[*chunks, PrefillChunk(seqs[9], 0, 4)])


def test_chunks_of_several_prompts_are_attended_to_as_each_alone(tmp_path: Path) -> None:
    INTERPRETED["v3"].make(tmp_path / "model", tmp_path)
    engine = interpreted_engine(tmp_path / "model", recorded=False)
    runner = engine._runner
    step = step_of_all_kinds(engine)
    with choice.forced("reference"):
        alone = [Step(decodes=step.decodes), *(Step(chunks=[chunk]) for chunk in step.chunks)]
        expected = runner.logits(torch.cat([runner.forward(each) for each in alone]))
    engine.pool.latents[:, step.chunks[2].seq.block_table] = float("nan")  # nothing is there yet
    for path in ("reference", "triton"):
        with choice.forced(path):
            logits = runner.logits(runner.forward(step))
        assert error(logits, expected) < PLAIN_TOLERANCE


def eager(run: Callable[[], Tensor]) -> Recording:
    """What a CUDA graph does, done anew each time."""
    output = run().clone()

    def replay() -> None:
        output.copy_(run())

    return Recording(output, replay)


def interpreted_engine(path: Path, *, recorded: bool) -> Engine:
    config = EngineConfig(num_blocks=12, dtype="float32", max_context=128, kernels="triton")
    engine = Engine.load(path, config)
    if recorded:
        assert isinstance(engine._runner, ModelRunner)
        model, pool = engine._runner.model, engine.pool
        graphs = DecodeGraphs(model, pool, max_batch=4, max_context=128, record=eager)
        engine._runner = ModelRunner(model, pool, graphs)
    return engine


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
def test_an_engine_on_kernels_generates_the_tokens_of_the_references(
    recorded: bool, tmp_path: Path
) -> None:
    INTERPRETED["v3"].make(tmp_path / "model", tmp_path)
    greedy = SamplingParams(temperature=0, max_tokens=3)
    prompts = [prompt(length).tolist() for length in (2, 5, 9)]
    tokens = []
    reference = EngineConfig(num_blocks=12, dtype="float32", kernels="reference")
    for engine in (
        Engine.load(tmp_path / "model", reference),
        interpreted_engine(tmp_path / "model", recorded=recorded),
    ):
        choice.force(engine.config.kernels)
        for index, token_ids in enumerate(prompts):
            engine.submit(make_sequence(engine, str(index), token_ids, greedy))
        outputs = run_all(engine)
        tokens.append([generated(outputs, str(index)) for index in range(len(prompts))])
    assert tokens[0] == tokens[1]


def test_padding_rows_of_a_recording_store_nothing(tmp_path: Path) -> None:
    INTERPRETED["v3"].make(tmp_path / "model", tmp_path)
    engine = interpreted_engine(tmp_path / "model", recorded=True)
    seqs = [
        make_sequence(engine, str(index), prompt(length).tolist(), SamplingParams(max_tokens=2))
        for index, length in enumerate((3, 9, 63))
    ]
    for seq in seqs:
        engine.submit(seq)
    engine.step()
    assert isinstance(engine._runner, ModelRunner)
    written = {seq.slot(len(seq.token_ids) - 1) for seq in seqs}
    before = engine.pool.latents.clone()
    with choice.forced("triton"):
        engine._runner.forward(Step(decodes=seqs))
    changed = (engine.pool.latents != before).any(-1).any(0).nonzero().tolist()
    assert {block * 64 + offset for block, offset in changed} == written


def test_recordings_waste_few_rows() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    for num_rows in range(1, 129):
        size = next(size for size in graph_sizes(128) if size >= num_rows)
        assert size - num_rows < max(num_rows, 8)
