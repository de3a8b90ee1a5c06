"""Which implementation of an op runs: torch, Triton, or what the tensors' device calls for.

`auto` is Triton on a GPU and the reference everywhere else. `force` is what the config key sets
once for a process; with it, Triton also runs on a CPU where its interpreter is on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import Tensor

Path = Literal["auto", "reference", "triton"]
PATHS: tuple[Path, ...] = get_args(Path)

_path: Path = "auto"


def force(path: Path) -> None:
    """Take `path` for every op of this process from now on; ValueError if there is none such."""
    global _path  # noqa: PLW0603 - one process has one choice, as it has one device
    if path not in PATHS:
        raise ValueError(f"kernels: no path {path!r}; there are {', '.join(PATHS)}")
    _path = path


@contextmanager
def forced(path: Path) -> Iterator[None]:
    """Take `path` within the block."""
    before = _path
    force(path)
    try:
        yield
    finally:
        force(before)


def takes_triton(tensor: Tensor) -> bool:
    """Whether an op whose arguments lie where `tensor` does runs its Triton kernel."""
    return tensor.is_cuda if _path == "auto" else _path == "triton"
