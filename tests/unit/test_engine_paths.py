"""X1: the path that computed a token's context never changes the answer beyond arithmetic noise."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.engine_harness import (
    GREEDY,
    commit_prompt,
    first_token_of,
    generated,
    load_engine,
    make_sequence,
    make_sequence_with_reuse,
    run_all,
    run_sequence,
)
from tests.tiny_model import YARN, make_tiny_checkpoint
from tests.x1 import E_LOGIT, E_ROUTE, Gaps, reference_gaps
from tidemill.engine import Engine, FinishedOutput, Output, SamplingParams, Sequence
from tidemill.engine.runner import ModelRunner
from tidemill.engine.scheduler import PrefillChunk, Step
from tidemill.models.deepseek import Dispatched, MoeMlp

LONG = SamplingParams(temperature=0, max_tokens=60)
LENGTHS = (1, 5, 63, 64, 65, 128, 129, 200, 300)
# Between the paths' positions that must agree and all positions: the test keeps its teeth.
LEAST_COMPARED_SHARE = 0.9


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), rope_parameters=YARN)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.manual_seed(11)
    return [torch.randint(6, 512, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def whole(model_dir: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The path that the others are held against: whole prompt, alone in the batch."""
    engine = load_engine(model_dir)
    return [run_sequence(engine, make_sequence(engine, "s", prompt)) for prompt in prompts]


@pytest.fixture(scope="module")
def gaps(model_dir: Path, prompts: list[list[int]], whole: list[list[int]]) -> list[Gaps]:
    return [
        reference_gaps(model_dir, prompt + tokens[:-1])
        for prompt, tokens in zip(prompts, whole, strict=True)
    ]


def _chunked(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    streams = []
    for index, prompt in enumerate(prompts):
        engine = load_engine(path, step_tokens=(37, 61, 7, 100)[index % 4])
        streams.append(run_sequence(engine, make_sequence(engine, "s", prompt)))
    return streams


def _prefix_hit(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    engine = load_engine(path)
    streams = []
    for prompt in prompts:
        first = make_sequence(engine, "first", prompt)
        engine.submit(first)
        run_all(engine)
        commit_prompt(engine, first)
        engine.pool.release(first.block_table)
        again = make_sequence_with_reuse(engine, "again", prompt)
        cached = again.block_table[: len(prompt) // 64]
        assert again.num_cached_tokens == 64 * len(cached)
        before = engine.pool.latents[:, cached].clone()
        streams.append(run_sequence(engine, again))
        assert torch.equal(engine.pool.latents[:, cached], before)  # X1(a)
    engine.pool.check_integrity()
    return streams


def _handed_over(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    source, target = load_engine(path), load_engine(path)
    target.pool.allocate(3)  # so that block numbers differ
    return [_hand_over(source, target, prompt) for prompt in prompts]


def _hand_over(source: Engine, target: Engine, prompt: list[int]) -> list[int]:
    """Prefill in one engine, move the latents layer by layer as they appear, decode in another."""
    blocks = source.pool.allocate(-(-len(prompt) // 64))
    destination = target.pool.allocate(-(-(len(prompt) + GREEDY.max_tokens) // 64))

    def move(layer: int, start: int, end: int) -> None:
        values = source.pool.read(layer, blocks, start, end)
        target.pool.write(layer, destination, start, values)

    prefill = Sequence(
        "p", prompt, block_table=blocks, sampling=GREEDY, prefill_only=True, on_layer=move
    )
    source.submit(prefill)
    first = first_token_of(run_all(source), "p")
    for layer in range(source.layout.num_layers):
        moved = target.pool.read(layer, destination, 0, len(prompt))
        assert torch.equal(source.pool.read(layer, blocks, 0, len(prompt)), moved)  # X1(a)
    source.pool.release(blocks)
    seq = Sequence("d", prompt, block_table=destination, sampling=GREEDY, first_token_id=first)
    return [first, *run_sequence(target, seq)]


def _crowded(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """All at once with small chunks; every prompt also comes as a decoy that leaves early."""
    engine = load_engine(path, step_tokens=50, max_batch=6)
    outputs = []
    seqs = []
    for index, prompt in enumerate(prompts):
        decoy = make_sequence(engine, f"decoy{index}", prompt[::-1])
        seq = make_sequence(engine, str(index), prompt)
        seqs += [decoy, seq]
        engine.submit(decoy)
        engine.submit(seq)
        for _ in range(index):
            outputs += engine.step()
        engine.stop(f"decoy{index}", "cancelled")
    outputs += run_all(engine)
    for seq in seqs:
        engine.pool.release(seq.block_table)
    engine.pool.check_integrity()
    assert engine.pool.num_referenced == 0
    return [generated(outputs, str(index)) for index in range(len(prompts))]


def _chunked_beside_decode(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Odd chunks in steps that a running neighbour has a row of."""
    streams = []
    for index, prompt in enumerate(prompts):
        engine = load_engine(path, step_tokens=(38, 62, 8, 101)[index % 4])
        neighbour = make_sequence(engine, "neighbour", prompt[:7], LONG)
        engine.submit(neighbour)
        engine.step()
        seq = make_sequence(engine, "s", prompt)
        engine.submit(seq)
        outputs = run_all(engine)
        streams.append(generated(outputs, "s"))
        assert len(generated(outputs, "neighbour")) == LONG.max_tokens - 1
    return streams


def _batch_of_1_to_32(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Neighbours join and leave at every step."""
    engine = load_engine(path, num_blocks=160, step_tokens=128)
    waiting = [make_sequence(engine, str(index), prompt) for index, prompt in enumerate(prompts)]
    sizes: set[int] = set()
    outputs: list[Output] = []
    for step in range(100):
        if step % 8 == 0 and waiting:
            engine.submit(waiting.pop(0))
        if step % 32 >= 8:
            sampling = SamplingParams(temperature=0, max_tokens=20 + step * 7 % 60)
            engine.submit(make_sequence(engine, f"neighbour{step}", [6 + step] * 3, sampling))
        if step % 5 == 0:
            engine.stop(f"neighbour{step - 10}", "cancelled")
        outputs += engine.step()
        sizes.add(len(engine.current_step.decodes))
    outputs += run_all(engine)
    assert max(sizes) == 32
    assert len(sizes) > 20
    return [generated(outputs, str(index)) for index in range(len(prompts))]


def _swapped(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """A pool that holds the prompts, and nothing for what they generate."""
    most = sum(-(-len(prompt) // 64) for prompt in prompts)
    engine = load_engine(path, num_blocks=most)
    seqs: dict[str, Sequence] = {}
    for index, prompt in reversed(list(enumerate(prompts))):  # the youngest have few blocks
        blocks = engine.pool.allocate(-(-len(prompt) // 64))
        seq = Sequence(str(index), prompt, block_table=blocks, sampling=GREEDY)
        seqs[seq.seq_id] = seq
        engine.submit(seq)
    outputs: list[Output] = []
    left: dict[str, Tensor] = {}
    num_returned = 0
    while engine.has_work:
        before = {seq_id: _latents_of(engine, seq) for seq_id, seq in seqs.items()}
        new = engine.step()
        for seq_id, seq in seqs.items():
            if not seq.block_table:
                left.setdefault(seq_id, before[seq_id])
            elif seq_id in left:
                had = left.pop(seq_id)
                assert torch.equal(_latents_of(engine, seq)[:, : had.shape[1]], had)  # X1(a)
                num_returned += 1
        for output in new:
            if isinstance(output, FinishedOutput):
                engine.pool.release(seqs.pop(output.seq_id).block_table)
        outputs += new
    assert num_returned >= 3
    engine.check_idle()
    return [generated(outputs, str(index)) for index in range(len(prompts))]


def _latents_of(engine: Engine, seq: Sequence) -> Tensor:
    """[L, positions computed, D]; none while the sequence is swapped out."""
    end = seq.num_computed_tokens if seq.block_table else 0
    layers = range(engine.layout.num_layers)
    return torch.stack([engine.pool.read(layer, seq.block_table, 0, end) for layer in layers])


def _forked(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The last of three choices of each prompt, all in one batch."""
    engine = load_engine(path, num_blocks=128, step_tokens=100)
    seqs = []
    for index, prompt in enumerate(prompts):
        forks = [Sequence(f"{index}.{n}", prompt, sampling=GREEDY) for n in (1, 2)]
        blocks = engine.pool.allocate(-(-len(prompt) // 64))
        seq = Sequence(str(index), prompt, block_table=blocks, sampling=GREEDY, forks=forks)
        engine.submit(seq)
        seqs += [seq, *forks]
    outputs = run_all(engine)
    for seq in seqs:
        engine.pool.release(seq.block_table)
    engine.check_idle()
    return [generated(outputs, f"{index}.2") for index in range(len(prompts))]


PATHS: dict[str, Callable[[Path, list[list[int]]], list[list[int]]]] = {
    "chunked": _chunked,
    "prefix_hit": _prefix_hit,
    "handed_over": _handed_over,
    "crowded": _crowded,
    "chunked_beside_decode": _chunked_beside_decode,
    "batch_of_1_to_32": _batch_of_1_to_32,
    "swapped": _swapped,
    "forked": _forked,
}


@pytest.mark.parametrize("name", PATHS)
def test_x1b_greedy_tokens_agree_wherever_the_gaps_are_clear(
    name: str,
    model_dir: Path,
    prompts: list[list[int]],
    whole: list[list[int]],
    gaps: list[Gaps],
) -> None:
    compared = 0
    streams = PATHS[name](model_dir, prompts)
    for prompt, expected, stream, gap in zip(prompts, whole, streams, gaps, strict=True):
        assert len(stream) == len(expected) == GREEDY.max_tokens
        for index, (ours, theirs) in enumerate(zip(stream, expected, strict=True)):
            if ours != theirs:
                assert gap.excuses(len(prompt) - 1 + index)
                break
            compared += 1
    assert compared >= LEAST_COMPARED_SHARE * GREEDY.max_tokens * len(prompts)


def test_whole_path_draws_what_transformers_would(
    prompts: list[list[int]], whole: list[list[int]], gaps: list[Gaps]
) -> None:
    for prompt, tokens, gap in zip(prompts, whole, gaps, strict=True):
        best = gap.logits[len(prompt) - 1 :].argmax(-1).tolist()
        for index, (ours, theirs) in enumerate(zip(tokens, best, strict=True)):
            assert ours == theirs or gap.excuses(len(prompt) - 1 + index)


def test_paths_differ_by_far_less_than_the_gaps_we_excuse(
    model_dir: Path, prompts: list[list[int]]
) -> None:
    """Measures E_LOGIT and E_ROUTE: at last tokens, whole against chunked against absorbed."""
    engine = load_engine(model_dir)
    scores = _record_choices(engine)
    worst_logit = worst_route = 0.0
    for prompt in prompts:
        blocks = engine.pool.allocate(6)
        seq = Sequence("s", prompt, block_table=blocks, sampling=SamplingParams(temperature=0))
        expected, expected_scores = _last_logits(engine, seq, [len(prompt)]), scores.copy()
        splits = [range(0, len(prompt), step)[1:] for step in (len(prompt) // 3 + 1, 40)]
        runs = [partial(_last_logits, engine, seq, [*ends, len(prompt)]) for ends in splits]
        for run in (*runs, partial(_logits_after, engine, Step(decodes=[seq]))):
            scores.clear()
            worst_logit = max(worst_logit, (run() - expected).abs().max().item())
            for layer, choice in scores.items():
                difference = (choice - expected_scores[layer]).abs().max().item()
                worst_route = max(worst_route, difference)
        engine.pool.release(blocks)
    assert 0 < worst_logit < E_LOGIT / 10
    assert 0 < worst_route < E_ROUTE / 10


@dataclass(frozen=True)
class _RecordingMoe(MoeMlp):
    """Notes the biased scores of the last token that it routed."""

    note: Callable[[Tensor], None]

    def dispatch(self, hidden: Tensor) -> Dispatched:
        assert self.gate_bias is not None
        self.note(linear(self.norm(hidden[-1:])[0].float(), self.gate).sigmoid() + self.gate_bias)
        return super().dispatch(hidden)


def _record_choices(engine: Engine) -> dict[int, Tensor]:
    assert isinstance(engine._runner, ModelRunner)
    model = engine._runner.model
    scores: dict[int, Tensor] = {}
    layers = list(model.layers)
    for index, layer in enumerate(layers):
        if isinstance(layer.mlp, MoeMlp):
            parts = {field.name: getattr(layer.mlp, field.name) for field in fields(MoeMlp)}
            recording = _RecordingMoe(**parts, note=partial(scores.__setitem__, index))
            layers[index] = replace(layer, mlp=recording)
    model.layers = layers
    return scores


def _last_logits(engine: Engine, seq: Sequence, ends: list[int]) -> Tensor:
    start = 0
    for end in ends:
        logits = _logits_after(engine, Step(chunks=[PrefillChunk(seq, start, end)]))
        start = end
    return logits


def _logits_after(engine: Engine, step: Step) -> Tensor:
    """Logits [1, V] after the step's last row."""
    return engine._runner.logits(engine._runner.forward(step)[-1:])
