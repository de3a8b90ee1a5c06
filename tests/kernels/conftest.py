from typing import Any

import pytest
import torch
from torch import Tensor

# Small products: threads would only fight with the other processes of a test run.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has written is NaN, or the least integer: a kernel that leaves a gap shows."""
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoning(getattr(owner, name)))


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def either_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs by their ids, or the last first, as a GPU might."""
    from triton.runtime.interpreter import InterpreterBuilder  # noqa: PLC0415 - triton is heavy

    place = InterpreterBuilder.set_grid_idx

    def mirrored(builder: Any, *ids: int) -> None:
        place(builder, *(size - 1 - i for size, i in zip(builder.grid_dim, ids, strict=True)))

    if request.param:
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", mirrored)


def _poisoning(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        return poison(make(*args, **kwargs))

    return made


def poison(tensor: Tensor) -> Tensor:
    """The same tensor, each element NaN or, of integers, the least there is."""
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return tensor.fill_(float("nan"))
    return tensor.fill_(torch.iinfo(tensor.dtype).min)
