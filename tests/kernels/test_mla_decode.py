from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tidemill.kernels import choice
from tidemill.kernels.cases import MLA_DECODE_CASES, MLA_DECODE_GPU_CASES, MlaDecodeCase
from tidemill.kernels.mla_decode import mla_decode, reference

pytest.importorskip("triton")
from tidemill.kernels.mla_decode import configs, kernel
from tidemill.kernels.tiles import all_tiles

SCALE = 0.11
# dtype -> absolute and relative
TOLERANCES = {
    torch.float32: (2e-5, 2e-4),
    torch.float16: (4e-3, 1e-2),
    torch.bfloat16: (2e-2, 2e-2),
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(case: MlaDecodeCase, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Query, pool, tables and lengths; what a pool holds after a sequence's end is NaN."""
    generator = torch.Generator(device).manual_seed(sum(case.context_lens))
    width = case.kv_lora_rank + case.rope_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    counts = [-(-length // 64) for length in case.context_lens]
    numbers = torch.randperm(sum(counts), generator=generator, device=device) + 1
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int64, device=device)
    pool = torch.full((sum(counts) + 1, 64, width), float("nan"), dtype=dtype, device=device)
    for row, (blocks, length) in enumerate(
        zip(torch.split(numbers, counts), case.context_lens, strict=True)
    ):
        tables[row, : len(blocks)] = blocks
        pool[blocks] = random(len(blocks), 64, width)
        if length % 64:
            pool[blocks[-1], length % 64 :] = float("nan")
    query = random(len(counts), case.num_tokens, case.num_heads, width) * width**-0.25
    return query, pool, tables, torch.tensor(case.context_lens, device=device)


def attend(
    function: Callable[..., Tensor], inputs: Inputs, case: MlaDecodeCase, **settings: object
) -> Tensor:
    return function(*inputs, kv_lora_rank=case.kv_lora_rank, scale=SCALE, **settings)


def assert_near(out: Tensor, truth: Tensor) -> None:
    atol, rtol = TOLERANCES[truth.dtype]
    torch.testing.assert_close(out, truth, atol=atol, rtol=rtol)
    # A long context's mean is itself no larger than the tolerance of one value.
    assert (out - truth).float().norm() <= rtol * truth.float().norm()


def expected(inputs: Inputs, case: MlaDecodeCase) -> Tensor:
    query, pool, tables, lens = inputs
    return attend(reference.mla_decode, (query, pool.nan_to_num(0.0), tables, lens), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", MLA_DECODE_CASES, ids=str)
def test_mla_decode_matches_reference(case: MlaDecodeCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    out = attend(kernel.mla_decode, inputs, case)
    assert_near(out, expected(inputs, case))


@pytest.mark.gpu
@pytest.mark.parametrize("case", MLA_DECODE_GPU_CASES, ids=str)
def test_mla_decode_matches_reference_on_gpu(case: MlaDecodeCase) -> None:
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    out = attend(mla_decode, inputs, case)
    assert_near(out, expected(inputs, case))


@pytest.mark.parametrize("tile", all_tiles(configs.TILES), ids=str)
def test_mla_decode_matches_reference_by_every_tile(tile: configs.Tile) -> None:
    for case in (MLA_DECODE_CASES[2], MLA_DECODE_CASES[3]):
        inputs = make_inputs(case, torch.float32)
        assert_near(attend(kernel.mla_decode, inputs, case, tile=tile), expected(inputs, case))


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 40])
def test_mla_decode_is_the_same_however_blocks_are_shared_out(num_parts: int) -> None:
    case = MLA_DECODE_CASES[1]
    inputs = make_inputs(case, torch.float32)
    out = attend(kernel.mla_decode, inputs, case, num_parts=num_parts)
    assert_near(out, expected(inputs, case))


def test_mla_decode_takes_tables_of_int32_and_queries_of_one_token() -> None:
    case = MLA_DECODE_CASES[1]
    query, pool, tables, lens = make_inputs(case, torch.float32)
    out = attend(kernel.mla_decode, (query[:, 0], pool, tables.int(), lens.int()), case)
    assert out.shape == (len(lens), case.num_heads, case.kv_lora_rank)
    assert_near(out, expected((query, pool, tables, lens), case)[:, 0])


def test_mla_decode_gives_zeros_for_a_padding_row_without_context() -> None:
    case = MLA_DECODE_CASES[1]
    query, pool, tables, lens = make_inputs(case, torch.float32)
    lens[1] = 0
    out = attend(kernel.mla_decode, (query, pool, tables, lens), case)
    assert (out[1] == 0).all()


def test_mla_decode_runs_triton_only_where_it_is_chosen() -> None:
    case = MLA_DECODE_CASES[0]
    query, pool, tables, lens = make_inputs(case, torch.float32)
    inputs = query, pool.nan_to_num(0.0), tables, lens
    assert torch.equal(attend(mla_decode, inputs, case), attend(reference.mla_decode, inputs, case))
    with choice.forced("triton"):
        assert torch.equal(
            attend(mla_decode, inputs, case), attend(kernel.mla_decode, inputs, case)
        )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda q, p, t, n: (q.half(), p, t, n), r"latents is \[.*\] float32"),
        (lambda q, p, t, n: (q, p[:, :32], t, n), r"latents is \[\d+, 32, 48\]"),
        (lambda q, p, t, n: (q, p, t[:1], n), r"block_tables is \[1, "),
        (lambda q, p, t, n: (q, p, t, n.float()), "context_lens is .* expected .* int32 or int64"),
        (lambda q, p, t, n: (q.repeat(1, 1, 2, 1)[:, :, ::2], p, t, n), "contiguous"),
        (lambda q, p, t, n: (q.repeat(1, 3, 1, 1), p, t, n), "one or two query tokens .* S=3"),
    ],
)
def test_mla_decode_refuses_what_it_would_misread(
    change: Callable[..., Inputs], complaint: str
) -> None:
    case = MLA_DECODE_CASES[1]
    case_inputs = make_inputs(case, torch.float32)
    query, pool, tables, lens = case_inputs
    with pytest.raises(ValueError, match=complaint):
        attend(kernel.mla_decode, change(query, pool, tables, lens), case)
