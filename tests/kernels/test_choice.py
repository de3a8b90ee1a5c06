from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tidemill.kernels import choice


def on_gpu() -> Any:
    return SimpleNamespace(is_cuda=True)


def test_device_decides_unless_a_path_is_forced() -> None:
    assert not choice.takes_triton(torch.zeros(1))
    assert choice.takes_triton(on_gpu())


def test_forced_path_holds_for_its_block_only() -> None:
    with choice.forced("triton"):
        assert choice.takes_triton(torch.zeros(1))
        with choice.forced("reference"):
            assert not choice.takes_triton(on_gpu())
        assert choice.takes_triton(torch.zeros(1))
    assert not choice.takes_triton(torch.zeros(1))


def test_forced_path_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="of the block"), choice.forced("triton"):
        raise RuntimeError("of the block")
    assert not choice.takes_triton(torch.zeros(1))


def test_unknown_path_is_refused() -> None:
    wrong: Any = "cuda"
    with pytest.raises(ValueError, match=r"no path 'cuda'; there are auto, reference, triton"):
        choice.force(wrong)
