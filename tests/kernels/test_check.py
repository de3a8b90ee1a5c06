import re

import pytest
import torch
from torch import Tensor

from tidemill.kernels.check import Arguments


def test_dimension_means_the_same_in_every_argument() -> None:
    args = Arguments("op")
    args.take("x", torch.zeros(2, 3, 8), "... D")
    args.take("weight", torch.zeros(4, 8), "N D")
    assert args.sizes == {"D": 8, "N": 4}
    with pytest.raises(ValueError, match=re.escape("op: bias is [8] float32 on cpu")):
        args.take("bias", torch.zeros(8), "N")


def test_complaint_tells_what_was_found_and_what_was_expected() -> None:
    args = Arguments("op", D=8)
    args.take("x", torch.zeros(3, 8), "T D")
    with pytest.raises(ValueError, match="op: w") as caught:
        args.take("w", torch.zeros(6, 2).T, "D N", torch.bfloat16, torch.float16)
    assert str(caught.value) == (
        "op: w is [2, 6] float32 on cpu, strides (1, 2); "
        "expected [D=8, N] bfloat16 or float16 on cpu, last stride 1"
    )


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (torch.zeros(3, 9), "a size"),
        (torch.zeros(8), "a dimension less"),
        (torch.zeros(1, 3, 8), "a dimension more"),
        (torch.zeros(3, 8, dtype=torch.float64), "the dtype"),
        (torch.zeros(8, 3).T, "the stride"),
        (torch.zeros(3, 8, device="meta"), "the device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensor_is_refused_for(wrong: Tensor, why: str) -> None:
    args = Arguments("op")
    args.take("x", torch.zeros(3, 8), "_ D")
    with pytest.raises(ValueError, match="op: y is"):
        args.take("y", wrong, "3 D", torch.float32)


def test_strided_argument_may_have_any_strides() -> None:
    Arguments("op").take("x", torch.zeros(8, 3).T, "T D", strided=True)


def test_leading_dimensions_may_be_none_at_all() -> None:
    Arguments("op").take("x", torch.zeros(8), "... D")
    with pytest.raises(ValueError, match="expected"):
        Arguments("op").take("x", torch.zeros(()), "... D")


def test_requirement_that_fails_names_the_sizes() -> None:
    args = Arguments("op")
    args.take("x", torch.zeros(3, 100), "T D")
    args.require(True, "never said")
    with pytest.raises(ValueError, match="op: D must be a multiple of 128; got T=3, D=100"):
        args.require(args.sizes["D"] % 128 == 0, "D must be a multiple of 128")
