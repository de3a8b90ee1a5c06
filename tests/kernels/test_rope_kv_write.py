from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tidemill.kernels.cases import ROPE_CASES, ROPE_GPU_CASES, RopeCase
from tidemill.kernels.choice import forced
from tidemill.kernels.rms_norm.reference import rms_norm
from tidemill.kernels.rope import apply_rope
from tidemill.kernels.rope_kv_write import reference, rope_kv_write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
BLOCK = 64


@dataclass(frozen=True)
class Inputs:
    query: Tensor
    kv_a: Tensor
    norm_weight: Tensor
    rotation: Tensor
    latents: Tensor  # 9s: what is not written stays
    decoding: Tensor  # likewise; its rows lie apart

    def run(
        self, op: object, slots: list[int], written: list[int] | None, num_decoding: int = 0
    ) -> None:
        assert callable(op)
        op(
            self.query,
            self.kv_a,
            self.norm_weight,
            EPS,
            self.rotation,
            self.latents,
            torch.tensor(slots, dtype=torch.int64, device=DEVICE),
            None if written is None else torch.tensor(written, dtype=torch.int64, device=DEVICE),
            self.decoding[:num_decoding] if num_decoding else None,
        )


def random_inputs(case: RopeCase, dtype: torch.dtype) -> Inputs:
    """The same tensors for the same case; kv_a's rows lie beside others, as qkv_a's output has."""
    generator = torch.manual_seed(case.num_tokens)
    width, dim = case.nope_dim + case.rope_dim, case.kv_lora_rank + case.rope_dim
    beside = torch.randn(case.num_tokens, 24 + dim, generator=generator)
    query = torch.randn(case.num_tokens, case.num_heads, width, generator=generator)
    weight = torch.randn(case.kv_lora_rank, generator=generator)
    angles = torch.randn(case.num_tokens, case.rope_dim // 2, generator=generator) * 9
    blocks = -(-case.num_tokens // BLOCK) + 2
    return Inputs(
        query.to(dtype).to(DEVICE),
        beside.to(dtype).to(DEVICE)[:, 24:],
        weight.to(dtype).to(DEVICE),
        torch.polar(torch.ones_like(angles), angles).to(DEVICE),
        torch.full((blocks, BLOCK, dim), 9.0, dtype=dtype, device=DEVICE),
        torch.full((*query.shape[:2], dim), 9.0, dtype=dtype, device=DEVICE)[..., -case.rope_dim :],
    )


def test_a_row_is_normed_turned_and_stored_at_its_slot() -> None:
    case = RopeCase(2, 3, 32, 16, 8)
    given, inputs = (random_inputs(case, torch.float32) for _ in range(2))
    inputs.run(reference.rope_kv_write, [70, 5], None)
    pool = inputs.latents.flatten(0, 1)
    for row, slot in enumerate((70, 5)):
        latent, key = given.kv_a[row].tensor_split([32])
        expected = rms_norm(latent.unsqueeze(0), given.norm_weight, EPS)[0]
        torch.testing.assert_close(pool[slot, :32], expected)
        torch.testing.assert_close(pool[slot, 32:], apply_rope(key, given.rotation[row]))
        turned = apply_rope(given.query[row, :, 16:], given.rotation[row])
        torch.testing.assert_close(inputs.query[row, :, 16:], turned)
    assert torch.equal(inputs.query[..., :16], given.query[..., :16])
    assert (pool == 9).all(dim=1).sum() == len(pool) - 2


def test_rows_that_decode_are_turned_into_a_place_of_their_own() -> None:
    case = RopeCase(3, 2, 32, 16, 8)
    given, inputs = (random_inputs(case, torch.float32) for _ in range(2))
    inputs.run(reference.rope_kv_write, [0, 1, 2], None, num_decoding=2)
    turned = apply_rope(given.query[..., 16:], given.rotation.unsqueeze(1))
    torch.testing.assert_close(inputs.decoding[:2], turned[:2])
    torch.testing.assert_close(inputs.query[2, :, 16:], turned[2])
    assert torch.equal(inputs.query[:2], given.query[:2])
    assert (inputs.decoding[2:] == 9).all()


def equal_effects(case: RopeCase, dtype: torch.dtype, step: float, some: bool) -> None:
    """Run kernel and reference on the same inputs; all memory must come out alike."""
    count = case.num_tokens
    written = list(range(count))[::-2] if some else None
    slots = [BLOCK + 3 * i % (BLOCK * (len(range(count)) // BLOCK + 1)) for i in range(count)]
    slots = slots[: len(written)] if written is not None else slots
    assert len(set(slots)) == len(slots)
    found, expected = (random_inputs(case, dtype) for _ in range(2))
    with forced("triton"):
        found.run(rope_kv_write, slots, written, num_decoding=count // 2)
    expected.run(reference.rope_kv_write, slots, written, num_decoding=count // 2)
    torch.testing.assert_close(found.query, expected.query, rtol=step, atol=step)
    torch.testing.assert_close(found.decoding, expected.decoding, rtol=step, atol=step)
    torch.testing.assert_close(found.latents, expected.latents, rtol=step, atol=step)


@pytest.mark.parametrize("case", ROPE_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("some", [False, True])
def test_the_kernel_leaves_all_as_the_reference(
    case: RopeCase, dtype: torch.dtype, some: bool
) -> None:
    equal_effects(case, dtype, 2**-9 if dtype == torch.float16 else 1e-5, some)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ROPE_GPU_CASES, ids=str)
@pytest.mark.parametrize("some", [False, True])
def test_bf16_rows_are_left_as_the_reference_leaves_them(case: RopeCase, some: bool) -> None:
    equal_effects(case, torch.bfloat16, 2**-7, some)


def test_the_kernel_stores_nothing_for_a_row_without_a_slot() -> None:
    case = RopeCase(3, 2, 32, 16, 8)
    inputs = random_inputs(case, torch.float32)
    with forced("triton"):
        inputs.run(rope_kv_write, [-1, 4, -1], None)
    pool = inputs.latents.flatten(0, 1)
    assert (pool != 9).any(dim=1).nonzero().flatten().tolist() == [4]


def test_the_kernel_refuses_widths_that_do_not_agree() -> None:
    inputs = random_inputs(RopeCase(2, 2, 32, 16, 8), torch.float32)
    narrow = Inputs(
        inputs.query,
        inputs.kv_a[:, 4:],
        inputs.norm_weight,
        inputs.rotation,
        inputs.latents,
        inputs.decoding,
    )
    with forced("triton"), pytest.raises(ValueError, match=r"latents is \[3, 64, 40\].*D=36"):
        narrow.run(rope_kv_write, [0, 1], None)
    with forced("triton"), pytest.raises(ValueError, match="W must be T without written"):
        inputs.run(rope_kv_write, [0], None)
    few = random_inputs(RopeCase(1, 2, 32, 16, 8), torch.float32)
    more = replace(few, decoding=inputs.decoding)
    with forced("triton"), pytest.raises(ValueError, match="B must be at most T"):
        more.run(rope_kv_write, [0], None, num_decoding=2)
