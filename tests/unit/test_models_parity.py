"""Every variant of the family against transformers, in fp32, on random checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.engine_harness import generated, make_sequence, run_all
from tests.family import VARIANTS, Variant, pairwise_variants
from tests.model_probe import Probe
from tests.reference_model import load_reference
from tests.tiny_model import YARN, make_tiny_checkpoint
from tests.x1 import E_LOGIT, E_ROUTE, expert_choices, reference_gaps
from tidemill.engine import Engine, EngineConfig, SamplingParams
from tidemill.models.config import ModelConfig
from tidemill.models.deepseek import (
    DeepseekModel,
    Dispatched,
    MoeMlp,
)
from tidemill.models.parameters import num_parameters

# Of the reference's logit range: maximum minus minimum over the vocabulary.
TOLERANCE = 1e-4
LENGTHS = (1, 63, 64, 65, 300)
GREEDY = SamplingParams(temperature=0, max_tokens=64)
# Of all tokens drawn, those that must be the same, excused or not: so the rule keeps its teeth.
LEAST_EQUAL_SHARE = 0.98


@dataclass(frozen=True)
class Case:
    """A variant's checkpoint, the one that transformers reads for it, and our fp32 model."""

    path: Path
    reference: Path
    probe: Probe


def make_case(variant: Variant, folder: Path) -> Case:
    path = folder / "model"
    reference = variant.make(path, folder)
    return Case(path, reference, Probe(path, torch.float32))


@pytest.fixture(scope="module", params=list(VARIANTS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(VARIANTS[request.param], tmp_path_factory.mktemp(request.param))


def random_prompts() -> list[list[int]]:
    generator = torch.manual_seed(3)
    return [torch.randint(6, 512, (length,), generator=generator).tolist() for length in LENGTHS]


def check_logits(case: Case) -> None:
    """Whole and split, in prefill's form and in decode's, at every position of every prompt."""
    for prompt in random_prompts():
        expected = reference_gaps(case.reference, prompt).logits
        for form in (case.probe.prefill, case.probe.absorbed):
            case.probe.latents.zero_()
            for start in (0, len(prompt) // 2):
                assert_close(form(torch.tensor(prompt), start), expected[start:])


def assert_close(ours: Tensor, reference: Tensor) -> None:
    spread = reference.max(-1).values - reference.min(-1).values
    assert ((ours - reference).abs().max(-1).values / spread).max().item() < TOLERANCE


def check_greedy(case: Case) -> None:
    """X1(b): all prompts in one batch, each token held against transformers on our own tokens."""
    config = EngineConfig(num_blocks=40, dtype="float32", num_threads=1)
    engine = Engine.load(case.path, config)
    seqs = [
        make_sequence(engine, str(index), prompt, GREEDY)
        for index, prompt in enumerate(random_prompts())
    ]
    for seq in seqs:
        engine.submit(seq)
    outputs = run_all(engine)
    for seq in seqs:
        engine.pool.release(seq.block_table)
    drawn = equal = 0
    for index, prompt in enumerate(random_prompts()):
        tokens = generated(outputs, str(index))
        assert len(tokens) == GREEDY.max_tokens or tokens[-1] in engine.eos_token_ids
        gaps = reference_gaps(case.reference, prompt + tokens[:-1])
        best = gaps.logits[len(prompt) - 1 :].argmax(-1).tolist()
        for offset, (ours, theirs) in enumerate(zip(tokens, best, strict=True)):
            assert ours == theirs or gaps.excuses(len(prompt) - 1 + offset)
            drawn += 1
            equal += ours == theirs
    assert equal >= LEAST_EQUAL_SHARE * drawn


def test_logits_agree_with_transformers(case: Case) -> None:
    check_logits(case)


def test_x1b_greedy_tokens_are_those_of_transformers(case: Case) -> None:
    check_greedy(case)


def test_variants_differ_by_far_less_than_the_gaps_we_excuse(case: Case) -> None:
    """Measures E_LOGIT and E_ROUTE: what is ranked, ours in both forms against theirs."""
    prompt = random_prompts()[-1]
    expected = expert_choices(case.reference, prompt)
    logits = reference_gaps(case.reference, prompt).logits
    for form in (case.probe.prefill, case.probe.absorbed):
        with recorded_choices(case.probe.model) as choices:
            ours = form(torch.tensor(prompt))
        assert (ours - logits).abs().max().item() < E_LOGIT / 10
        for choice, theirs in zip(choices, expected, strict=True):
            assert (choice - theirs).abs().max().item() < E_ROUTE / 10


@dataclass(frozen=True)
class _RecordingMoe(MoeMlp):
    """Notes what it ranks experts by."""

    note: Callable[[Tensor], None]

    def dispatch(self, hidden: Tensor) -> Dispatched:
        logits = linear(self.norm(hidden).float(), self.gate)
        bias = self.gate_bias
        self.note(logits.softmax(-1) if bias is None else logits.sigmoid() + bias)
        return super().dispatch(hidden)


@contextmanager
def recorded_choices(model: DeepseekModel) -> Iterator[list[Tensor]]:
    """What each routing layer ranks experts by while the block runs, [T, E] each."""
    before, choices = model.layers, list[Tensor]()
    layers = []
    for layer in before:
        mlp = layer.mlp
        if isinstance(mlp, MoeMlp):
            parts = {field.name: getattr(mlp, field.name) for field in fields(MoeMlp)}
            mlp = _RecordingMoe(**parts, note=choices.append)
        layers.append(replace(layer, mlp=mlp))
    model.layers = layers
    yield choices
    model.layers = before


def test_parameters_are_those_of_the_file(case: Case) -> None:
    reference = load_reference(case.reference)
    # transformers keeps an empty matrix for no shared expert, and counts tied weights once.
    held = sum(parameter.numel() for parameter in reference.parameters())
    held += sum(
        buffer.numel()
        for name, buffer in reference.named_buffers()
        if name.endswith("e_score_correction_bias")
    )
    assert num_parameters(ModelConfig.load(case.path)) == held


@pytest.mark.slow
@pytest.mark.parametrize("index", range(60))
def test_every_pair_of_switches_agrees_with_transformers(tmp_path: Path, index: int) -> None:
    case = make_case(pairwise_variants(60, seed=20)[index], tmp_path)
    check_logits(case)
    check_greedy(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_x1c_half_precision_decode_errs_no_more_than_half_again_its_prefill(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = make_tiny_checkpoint(tmp_path, rope_parameters=YARN, dtype="bfloat16")
    probe = Probe(path, dtype)
    whole, absorbed = [], []
    for seed in range(5):
        tokens = torch.randint(0, 512, (300,), generator=torch.manual_seed(seed))
        exact = reference_gaps(path, tokens.tolist()).logits
        whole.append(probe.prefill(tokens).float() - exact)
        absorbed.append(probe.absorbed(tokens).float() - exact)
    assert _p999(absorbed) <= 1.5 * _p999(whole)


def _p999(errors: list[Tensor]) -> float:
    flat = torch.cat(errors).abs().flatten()
    return flat.kthvalue(int(0.999 * flat.numel())).values.item()
