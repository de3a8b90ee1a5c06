from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from tidemill.kernels import choice
from tidemill.kernels.cases import MLA_PREFILL_CASES, MLA_PREFILL_GPU_CASES, MlaPrefillCase
from tidemill.kernels.linear import make_linear
from tidemill.kernels.mla_prefill import kernel, mla_prefill, mla_prefill_ragged, reference
from tidemill.kernels.mla_prefill.configs import TILES, Tile
from tidemill.kernels.tiles import all_tiles

SCALE = 0.2
# dtype -> absolute and relative
TOLERANCES = {
    torch.float32: (2e-5, 2e-4),
    torch.float16: (4e-3, 1e-2),
    torch.bfloat16: (2e-2, 2e-2),
}
INTERPRETED = [torch.float32, torch.float16]


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    expanded: Tensor
    k_rope: Tensor
    query_starts: Tensor
    context_starts: Tensor

    def run(self, attend: Callable[..., Tensor]) -> Tensor:
        return attend(
            self.query,
            self.expanded,
            self.k_rope,
            self.query_starts,
            self.context_starts,
            scale=SCALE,
        )


def make_inputs(case: MlaPrefillCase, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """The shared keys are a view of wider rows, as in the pool's latents."""
    generator = torch.Generator(device).manual_seed(len(case.prompts))
    rows = torch.tensor([0] + [new for _, new in case.prompts]).cumsum(0).int()
    keys = torch.tensor([0] + [cached + new for cached, new in case.prompts]).cumsum(0).int()

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    width = case.nope_dim + case.rope_dim
    latents = random(int(keys[-1]), 16 + case.rope_dim)
    return Inputs(
        query=random(int(rows[-1]), case.num_heads, width) * 5 * width**-0.5,
        expanded=random(int(keys[-1]), case.num_heads, case.nope_dim + case.v_head_dim),
        k_rope=latents[:, 16:],
        query_starts=rows.to(device),
        context_starts=keys.to(device),
    )


def assert_matches(out: Tensor, truth: Tensor) -> None:
    atol, rtol = TOLERANCES[truth.dtype]
    torch.testing.assert_close(out, truth, atol=atol, rtol=rtol)
    # A long context's mean is itself no larger than the tolerance of one value.
    assert (out - truth).float().norm() <= rtol * truth.float().norm()


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
@pytest.mark.parametrize("case", MLA_PREFILL_CASES, ids=str)
def test_mla_prefill_matches_reference(case: MlaPrefillCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    with choice.forced("triton"):
        out = inputs.run(mla_prefill_ragged)
    assert_matches(out, inputs.run(reference.mla_prefill_ragged))


@pytest.mark.parametrize("tile", all_tiles(TILES), ids=str)
def test_mla_prefill_gives_the_same_by_every_tile(tile: Tile) -> None:
    inputs = make_inputs(MLA_PREFILL_CASES[1], torch.float32)
    assert_matches(
        inputs.run(partial(kernel.mla_prefill_ragged, tile=tile)),
        inputs.run(reference.mla_prefill_ragged),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", MLA_PREFILL_GPU_CASES, ids=str)
def test_mla_prefill_matches_reference_on_gpu(case: MlaPrefillCase) -> None:
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    out = inputs.run(mla_prefill_ragged)
    assert_matches(out, inputs.run(reference.mla_prefill_ragged))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's numpy
def test_mla_prefill_keeps_what_is_not_a_number_within_its_prompt() -> None:
    inputs = make_inputs(MLA_PREFILL_CASES[1], torch.float32)
    truth = inputs.run(reference.mla_prefill_ragged)
    first, last = inputs.context_starts[1:3].tolist()
    inputs.expanded[first:last] = float("nan")
    with choice.forced("triton"), torch.no_grad():
        out = inputs.run(mla_prefill_ragged)
    rows = inputs.query_starts.tolist()
    assert out[rows[1] : rows[2]].isnan().all()
    others = torch.ones(len(out), dtype=torch.bool)
    others[rows[1] : rows[2]] = False
    assert_matches(out[others], truth[others])


def test_mla_prefill_expands_latents_alike_on_either_path() -> None:
    case = MLA_PREFILL_CASES[1]
    inputs = make_inputs(case, torch.float32)
    kv_lora = 32
    generator = torch.manual_seed(3)
    latents = torch.randn(len(inputs.expanded), kv_lora + case.rope_dim, generator=generator)
    rows = case.num_heads * (case.nope_dim + case.v_head_dim)
    kv_b = make_linear(torch.randn(rows, kv_lora, generator=generator) * kv_lora**-0.5)

    def attend() -> Tensor:
        starts = inputs.query_starts, inputs.context_starts
        return mla_prefill(inputs.query, latents, kv_b, *starts, kv_lora_rank=kv_lora, scale=SCALE)

    truth = attend()
    with choice.forced("triton"):
        assert_matches(attend(), truth)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            {"query": torch.zeros(325, 2, 32).half()},
            "expanded is .* float32 .* expected .* float16",
        ),
        ({"query": torch.zeros(325, 3, 32)}, r"expanded is \[.*, 2, 40\].* expected .*H=3"),
        ({"k_rope": torch.zeros(5, 16)}, r"k_rope is \[5, 16\]"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "context_starts is"),
        ({"query": torch.zeros(325, 2, 33)}, "powers of two .* D=33"),
    ],
)
def test_mla_prefill_refuses_what_it_would_misread(
    change: dict[str, Tensor], complaint: str
) -> None:
    inputs = make_inputs(MLA_PREFILL_CASES[1], torch.float32)
    with choice.forced("triton"), pytest.raises(ValueError, match=complaint):
        replace(inputs, **change).run(mla_prefill_ragged)
