"""Arguments of an op, refused where a kernel would read past them or misread them.

    args = Arguments("rms_norm")
    args.take("x", x, "... D", torch.bfloat16, torch.float32)
    args.take("weight", weight, "D", torch.bfloat16, torch.float32)

A dimension's name is bound where it is first met; a number is that number; `_` is any size and a
leading `...` any number of dimensions. All tensors must lie on the device of the first.
"""

import torch
from torch import Tensor


class Arguments:
    """The arguments of one call of `op`, checked one by one; `sizes` are the names bound so far."""

    def __init__(self, op: str, **sizes: int) -> None:
        self.sizes = sizes
        self._op = op
        self._device: torch.device | None = None

    def take(
        self, name: str, tensor: Tensor, dims: str, *dtypes: torch.dtype, strided: bool = False
    ) -> None:
        """Check one tensor; ValueError tells what was found and what was expected.

        `dtypes`: those allowed, any if none is given. The last dimension must be dense (stride 1),
        unless `strided`: then the kernel takes every stride as an argument.
        """
        wrong = (
            not self._bind(dims.split(), tuple(tensor.shape))
            or (dtypes and tensor.dtype not in dtypes)
            or (self._device is not None and tensor.device != self._device)
            or not (strided or is_dense(tensor))
        )
        if wrong:
            raise ValueError(self._complaint(name, tensor, dims, dtypes, strided))
        self._device = tensor.device

    def require(self, holds: bool, what: str) -> None:
        """ValueError with `what` and the sizes bound so far, unless it holds."""
        if not holds:
            sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items())
            raise ValueError(f"{self._op}: {what}; got {sizes}")

    def _bind(self, dims: list[str], shape: tuple[int, ...]) -> bool:
        if dims[:1] == ["..."]:
            dims = dims[1:]
            shape = shape[max(0, len(shape) - len(dims)) :]
        if len(dims) != len(shape):
            return False
        return all(self._fits(dim, size) for dim, size in zip(dims, shape, strict=True))

    def _fits(self, dim: str, size: int) -> bool:
        if dim == "_":
            return True
        return size == (int(dim) if dim.isdecimal() else self.sizes.setdefault(dim, size))

    def _complaint(
        self, name: str, found: Tensor, dims: str, dtypes: tuple[torch.dtype, ...], strided: bool
    ) -> str:
        named = [f"{dim}={self.sizes[dim]}" if dim in self.sizes else dim for dim in dims.split()]
        expected = f"[{', '.join(named)}]"
        if dtypes:
            expected += " " + " or ".join(_name(dtype) for dtype in dtypes)
        if self._device is not None:
            expected += f" on {self._device}"
        if not strided:
            expected += ", last stride 1"
        return (
            f"{self._op}: {name} is {list(found.shape)} {_name(found.dtype)} on {found.device}, "
            f"strides {found.stride()}; expected {expected}"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory."""
    return tensor.ndim == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
