import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tidemill.kernels import choice
from tidemill.kernels.cases import SAMPLE_CASES, SAMPLE_GPU_CASES, SampleCase
from tidemill.kernels.sample import NONE_ALLOWED, Adjustments, Draws, sample

CPU = "cpu"
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def draws(num_rows: int, *, device: str = CPU, given: Mapping[str, Tensor] = {}) -> Draws:
    """Rows of every kind: each filter alone, all together, none, greedy."""
    generator = torch.manual_seed(0)
    kinds = torch.arange(num_rows) % 6

    def some(chosen: tuple[int, ...], value: Tensor, off: float) -> Tensor:
        on = torch.isin(kinds, torch.tensor(chosen))
        return torch.where(on, value.double(), off)

    rand = torch.rand(3, num_rows, generator=generator, dtype=torch.double)
    columns: dict[str, Any] = {
        "temperature": torch.where(kinds == 5, 0.0, 0.3 + rand[0]),
        "top_k": some((1, 4), torch.randint(1, 60, (num_rows,), generator=generator), 0).int(),
        "top_p": some((2, 4), 0.2 + 0.75 * rand[1], 1),
        "min_p": some((3, 4), 0.3 * rand[2], 0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator),
        "positions": torch.randint(0, 100_000, (num_rows,), generator=generator),
    }
    columns |= given
    return Draws(**{name: each.to(device) for name, each in columns.items()})


def adjustments(num_rows: int, num_tokens: int, device: str = CPU) -> Adjustments:
    """For every other row, from the first."""
    generator = torch.manual_seed(1)
    adjusted = (num_rows + 1) // 2
    rows = torch.where(torch.arange(num_rows) % 2 == 0, torch.arange(num_rows) // 2, -1)
    bias = torch.randn(adjusted, num_tokens, generator=generator, dtype=torch.double)
    forbidden = torch.rand(adjusted, num_tokens, generator=generator) < 0.3
    return Adjustments(
        rows=rows.int().to(device),
        repetition=(0.5 + torch.rand(adjusted, dtype=torch.double, generator=generator)).to(device),
        presence=torch.randn(adjusted, dtype=torch.double, generator=generator).to(device),
        frequency=torch.randn(adjusted, dtype=torch.double, generator=generator).to(device),
        seen=torch.randint(0, 5, (adjusted, num_tokens), generator=generator).int().to(device),
        bias=bias.masked_fill(forbidden, -math.inf).to(device),
    )


def both(logits: Tensor, asked: Draws) -> tuple[list[int], list[int]]:
    """What the reference and the kernel draw."""
    with choice.forced("reference"):
        expected = sample(logits, asked).tolist()
    with choice.forced("triton"):
        return expected, sample(logits, asked).tolist()


@pytest.mark.parametrize(
    ("case", "device"),
    [*((case, CPU) for case in SAMPLE_CASES)]
    + [pytest.param(case, "cuda", marks=pytest.mark.gpu) for case in SAMPLE_GPU_CASES],
    ids=str,
)
def test_sample_matches_reference(case: SampleCase, device: str) -> None:
    dtype = torch.float32 if device == CPU else torch.bfloat16
    logits = torch.randn(case.num_rows, case.num_tokens, generator=torch.manual_seed(7)) * 4
    asked = draws(case.num_rows, device=device)
    expected, found = both(logits.to(device, dtype), asked)
    assert found == expected
    assert len(set(found)) > 1 or case.num_rows == 1


@pytest.mark.parametrize("device", [CPU, GPU])
def test_adjusted_rows_match_reference_beside_plain_ones(device: str) -> None:
    logits = (torch.randn(8, 301, generator=torch.manual_seed(2)) * 3).to(device)
    table = adjustments(8, 301, device)
    plain, adjusted = draws(8, device=device), draws(8, device=device)
    adjusted = Draws(**(vars(adjusted) | {"adjustments": table}))
    expected, found = both(logits, adjusted)
    assert found == expected
    assert found[1::2] == both(logits, plain)[1][1::2]
    assert found[0::2] != both(logits, plain)[1][0::2]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_ties_with_the_last_one_kept_stay(device: str) -> None:
    rows = 24
    logits = torch.randint(0, 4, (rows, 40), generator=torch.manual_seed(3)).float().to(device)
    for filters in ({"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.5}):
        given = {
            "top_k": torch.full((rows,), filters.get("top_k", 0), dtype=torch.int32),
            "top_p": torch.full((rows,), filters.get("top_p", 1.0), dtype=torch.double),
            "min_p": torch.full((rows,), filters.get("min_p", 0.0), dtype=torch.double),
        }
        expected, found = both(logits, draws(rows, device=device, given=given))
        assert found == expected


def test_one_token_far_above_is_all_that_top_p_leaves() -> None:
    logits = torch.randn(4, 300)
    logits[:, 17] = 200.0
    asked = draws(4, given={"top_p": torch.full((4,), 0.9, dtype=torch.double)})
    assert both(logits, asked)[1] == [17] * 4


def test_infinitely_unlikely_tokens_are_never_drawn() -> None:
    logits = torch.full((6, 300), -math.inf)
    logits[:, 5], logits[:, 250] = 1.0, 1.5
    asked = draws(6, given={"top_k": torch.full((6,), 10, dtype=torch.int32)})
    expected, found = both(logits, asked)
    assert found == expected
    assert set(found) <= {5, 250}


def test_row_without_an_allowed_token_has_none_and_its_neighbours_draw_on() -> None:
    logits = torch.randn(3, 300, generator=torch.manual_seed(4))
    logits[1] = -math.inf
    expected, found = both(logits, draws(3))
    assert found == expected
    assert found[1] == NONE_ALLOWED
    assert min(found[0], found[2]) >= 0


def test_rows_may_lie_apart() -> None:
    wide = torch.randn(5, 400, generator=torch.manual_seed(5))
    expected, found = both(wide[:, :257], draws(5))
    assert found == expected


def test_no_rows_draw_nothing() -> None:
    with choice.forced("triton"):
        assert sample(torch.zeros(0, 100), draws(0)).tolist() == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"top_p": torch.ones(3, dtype=torch.double)}, r"top_p is \[3\] float64"),
        ({"top_k": torch.ones(4, dtype=torch.int64)}, r"top_k is \[4\] int64"),
        ({"seeds": torch.ones(8, dtype=torch.int64)[::2]}, r"seeds is .* strides \(2,\)"),
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Tensor], told: str) -> None:
    with choice.forced("triton"), pytest.raises(ValueError, match=f"sample: {told}"):
        sample(torch.zeros(4, 100), draws(4, given=wrong))
