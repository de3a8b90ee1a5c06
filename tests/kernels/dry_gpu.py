"""An H100 that is not there: the real path of the host up to the launch, and every kernel compiled.

    with DryGpu() as gpu:
        act_quant(torch.randn(8, 7168, device="cuda"))
    gpu.launches, gpu.waits

Tensors on "cuda" have everything but memory (torch's FakeTensor), those on the CPU are real; what
comes back from the device is zeros. Triton specialises and compiles as it would there, then its
launcher checks what the hardware would refuse, and records. Needs a process without
TRITON_INTERPRET.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from tidemill.kernels.aot import HOPPER, resources
from tidemill.kernels.device import tile_counters

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[2]
SHARED_BYTES = 232_448  # that a block may have
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)  # of a grid
MOST_BOX = 256  # elements of a descriptor's block in one dimension
MOST_THREADS = 1024  # of a block
PAGE = 512  # bytes that torch's allocator aligns to
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    memory_clock_rate=2_619_000,  # kHz
    memory_bus_width=5120,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
)
_ONLY_ALLOCATES = {
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel, copy or fill that the device would have been given."""

    name: str
    captured: bool
    grid: tuple[int, int, int] = (1, 1, 1)
    source: Any = None  # what Triton compiled; None: one of torch's
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass(frozen=True)
class Wait:
    """The host stands still until the device is done, which a graph does not allow."""

    why: str
    where: str  # file:line of this repository that asked
    captured: bool


class DryGpu:
    """What happened while it was entered. Nothing is refused but what the hardware would."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.waits: list[Wait] = []
        self.spills: dict[str, int] = {}  # bytes a thread of the kernels loaded meanwhile
        self.capturing = False
        self._stack = ExitStack()

    def clear(self) -> None:
        """Forget what happened so far."""
        for each in (self.launches, self.waits, self.spills):
            each.clear()

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        self._stack.callback(tile_counters.cache_clear)  # a fake one is no later launch's
        enter(_FakeMode(allow_non_fake_inputs=True))
        enter(_Dispatch(self))
        enter(_Unguarded())
        enter(mock.patch.multiple(torch.cuda, **_stand_ins(self)))
        enter(mock.patch.object(fake_tensor, "init_gpu_context"))
        enter(mock.patch.multiple(FakeTensor, data_ptr=_address, tolist=_to_list))
        enter(mock.patch.object(torch, "Generator", _generator))
        enter(mock.patch.object(triton.runtime.driver, "_active", _Driver(self)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def wait(self, why: str) -> None:
        """The host waits here."""
        self.waits.append(Wait(why, _caller(), self.capturing))

    @contextmanager
    def capture(self, *_: object, **__: object) -> Iterator[None]:
        """As `torch.cuda.graph`."""
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


_ON_CPU = torch.Generator


def _generator(_: object = "cpu") -> torch.Generator:
    return _ON_CPU()


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # torch's own lacks types
    """The device that `torch.cuda` speaks of is not to be touched."""

    avoid_device_init = True


class _Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own lacks types
    """Operators without a tensor on the GPU are run, others passed on to the mode beneath."""

    def __init__(self, gpu: DryGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._gpu = gpu
        self._pinned: dict[int, Tensor] = {}  # held, so that no other takes their places

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        device = kwargs.get("device")
        to_gpu = device is not None and device.type == "cuda"
        if not to_gpu and not any(each.is_cuda for each in tensors):
            return self._run_here(func, args, kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        kwargs |= dict.fromkeys({"pin_memory", "generator"} & kwargs.keys())
        op = func.overloadpacket
        if op in _ANSWERS:
            self._gpu.wait("a number is read")
            self._record(func, tensors)
            return _ANSWERS[op](*args, **kwargs)
        copies = op in (aten.copy_, aten._to_copy)
        if copies and not (to_gpu if op is aten._to_copy and device else args[0].is_cuda):
            return self._read(func, args, kwargs)
        for each in tensors:
            is_sent_late = copies and _is_async(args, kwargs) and self._is_pinned(each)
            if not each.is_cuda and each.ndim and not is_sent_late:
                self._gpu.wait("a tensor is sent from pages that are not pinned")
        found = func(*args, **kwargs)
        given = {_storage(each) for each in tensors}
        made = [each for each in tree_leaves(found) if isinstance(each, Tensor)]
        is_new = any(_storage(each) not in given for each in made) and op not in _ONLY_ALLOCATES
        if (is_new or func._schema.is_mutable) and any(each.numel() for each in made or tensors):
            self._record(func, tensors)
        return found

    def _run_here(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            found = func(*args, **kwargs)
        if pinned or func.overloadpacket is aten._pin_memory:
            self._pinned[_storage(found)] = found
        return found

    def _read(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._record(func, [args[0]])
        with unset_fake_temporarily():
            if func.overloadpacket is aten._to_copy:
                self._gpu.wait("a tensor is read")
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if not (_is_async(args, kwargs) and self._is_pinned(args[0])):
                self._gpu.wait("a tensor is read")
            return args[0].zero_()

    def _is_pinned(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._pinned

    def _record(self, func: Any, tensors: Sequence[Tensor]) -> None:
        dtypes = tuple(each.dtype for each in tensors)
        self._gpu.launches.append(Launch(str(func), self._gpu.capturing, dtypes=dtypes))


def _zero(tensor: Tensor) -> bool | float | int:
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.dtype.is_floating_point else 0


def _all_places(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.numel(), tensor.ndim, dtype=torch.int64)


def _counts(tensor: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return tensor.new_empty(minlength)


# What the host learns of a tensor, where it would have had to wait to learn more.
_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _zero,
    aten.equal: lambda *_: True,
    aten.nonzero: _all_places,
    aten.bincount: _counts,
}


def _is_composite(func: Any) -> bool:
    """Whether torch puts it together from other operators, each of which comes by itself."""
    key = "CompositeImplicitAutograd"
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), key
    )


def _is_async(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("non_blocking")) or (len(args) > 2 and bool(args[2]))


def _storage(tensor: Tensor) -> int:
    """A number that two tensors share where they lie in the same memory."""
    return int(tensor.untyped_storage()._cdata)


class _Unguarded(TorchFunctionMode):
    """What of torch sets the device before it dispatches: this build does not know how."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        ours = _UNGUARDED.get(func)
        if ours is None or not (args[0].is_cuda or func in (Tensor.cuda, Tensor.to)):
            return func(*args, **(kwargs or {}))
        return ours(*args, **(kwargs or {}))


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    places = index if isinstance(index, tuple) else (index,)
    places = tuple(_as_number(each) for each in places)  # as torch does: a wait
    if any(isinstance(each, Tensor) for each in places):
        if not all(isinstance(each, Tensor) or each == slice(None) for each in places):
            raise NotImplementedError(f"both slices and tensors in {index}")
        picks: list[Tensor | None] = []
        for each in places:
            is_mask = isinstance(each, Tensor) and each.dtype == torch.bool
            picks += aten.nonzero(each).unbind(1) if is_mask else [_or_none(each)]
        picked: Tensor = aten.index(tensor, picks)
        return picked
    with torch.utils._python_dispatch._disable_current_modes():
        part = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")[places]
    offset = tensor.storage_offset() + part.storage_offset()
    return tensor.as_strided(part.shape, part.stride(), offset)


def _as_number(place: Any) -> Any:
    is_number = isinstance(place, Tensor) and place.ndim == 0 and place.dtype != torch.bool
    return place.item() if is_number else place


def _or_none(place: Any) -> Tensor | None:
    return place if isinstance(place, Tensor) else None


def _assign(tensor: Tensor, index: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=tensor.dtype)
    _copy(_indexed(tensor, index), value)


def _copy(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        copied: Tensor = aten.copy_(tensor, source, non_blocking)
    return copied


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    parsed: tuple[Any, ...] = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype = parsed[0] or tensor.device, parsed[1] or tensor.dtype
    if device.type == tensor.device.type and dtype == tensor.dtype:
        return tensor
    with torch._C._AutoDispatchBelowAutograd():
        copied: Tensor = aten._to_copy(tensor, device=device, dtype=dtype, non_blocking=parsed[2])
    return copied


_UNGUARDED: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _assign,
    Tensor.copy_: _copy,
    Tensor.__float__: Tensor.item,
    Tensor.contiguous: aten.contiguous,
    Tensor.nonzero: aten.nonzero,
    Tensor.cuda: lambda tensor: _to(tensor, "cuda"),
    Tensor.to: _to,
}


def _address(tensor: Tensor) -> int:
    """As torch's allocator would have placed it."""
    offset = int(tensor.storage_offset()) * tensor.dtype.itemsize
    return _storage(tensor) // 16 * PAGE + offset


def _to_list(tensor: Tensor) -> Any:
    return tensor.cpu().tolist()


def _stand_ins(gpu: DryGpu) -> dict[str, Any]:
    """What `torch.cuda` answers."""
    stream = mock.MagicMock(name="stream", cuda_stream=0)
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: nullcontext(),
        "get_device_name": lambda *_: H100.name,
        "get_device_capability": lambda *_: (H100.major, H100.minor),
        "get_device_properties": lambda *_: H100,
        "mem_get_info": lambda *_: (H100.total_memory - (2 << 30), H100.total_memory),
        "current_stream": lambda *_: stream,
        "Stream": lambda *_, **__: stream,
        "stream": lambda _: nullcontext(),
        "synchronize": lambda *_: gpu.wait("synchronize"),
        "CUDAGraph": lambda *_: mock.MagicMock(name="graph"),
        "graph": gpu.capture,
        "empty_cache": lambda: None,
    }


def _caller() -> str:
    """The innermost line of this repository that is not the stand-in's own."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "?"


class _Driver:
    """Triton's driver of that GPU. Compiled kernels outlive it, so they ask for it anew."""

    def __init__(self, gpu: DryGpu) -> None:
        self.gpu = gpu
        self.utils = self
        self._form = ""

    def launcher_cls(self, source: Any, metadata: Any) -> "Launcher":
        self._form = _form(source)
        return Launcher(source, metadata)

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def load_binary(self, name: str, cubin: bytes, *_: int) -> tuple[Any, ...]:
        used = resources(cubin)
        spilled = used["STACK"] + used["LOCAL"]
        if spilled:
            self.gpu.spills[f"{name}[{self._form}]"] = spilled
        return object(), object(), used["REG"], spilled, MOST_THREADS

    def unload_module(self, module: object) -> None:
        pass


def _form(source: Any) -> str:
    """What of its arguments a kernel was compiled for."""
    constants = {at[0]: value for at, value in source.constants.items()}
    names = source.fn.arg_names
    kinds = [constants.get(at, source.signature[name]) for at, name in enumerate(names)]
    return " ".join(f"{name}={kind}" for name, kind in zip(names, kinds, strict=True))


class Launcher:
    """What Triton calls to launch a kernel: it refuses what the hardware would, and records."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._source, self._metadata = source, metadata
        self._name = source.fn.__name__
        self._descriptors = getattr(metadata, "tensordesc_meta", None) or ()

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        grid, args = (x, y, z), rest[_BEFORE_ARGUMENTS:]
        if any(size > most for size, most in zip(grid, MOST_PROGRAMS, strict=True)):
            raise ValueError(f"{self._name}: a grid of {grid}")
        if self._metadata.global_scratch_size:
            raise ValueError(f"{self._name}: descriptors made on the device need an allocator")
        given = [each for each in args if isinstance(each, TensorDescriptor)]
        for descriptor, metadata in zip(given, self._descriptors, strict=True):
            self._check_descriptor(descriptor, metadata)
        tensors = [each for each in args if isinstance(each, Tensor)]
        tensors += [each.base for each in given]
        if not all(each.is_cuda for each in tensors):
            raise ValueError(f"{self._name}: a pointer to the CPU's memory")
        gpu = triton.runtime.driver.active.gpu
        if x * y * z:
            gpu.launches.append(Launch(self._name, gpu.capturing, grid, self._source))

    def _check_descriptor(self, given: TensorDescriptor, metadata: dict[str, Any]) -> None:
        """The rules of cuTensorMapEncodeTiled."""
        size, box = given.base.dtype.itemsize, metadata["block_size"]
        swizzled = (0, 32, 64, 128)[metadata["swizzle"]] or MOST_BOX * size
        wrong = (
            given.base.data_ptr() % 16
            or any(stride * size % 16 or stride * size >= 2**40 for stride in given.strides[:-1])
            or any(not 0 < length <= 2**32 for length in given.shape)
            or any(not 0 < length <= MOST_BOX for length in box)
            or box[-1] * size % 16
            or box[-1] * size > swizzled
        )
        if wrong:
            raise ValueError(f"{self._name}: no descriptor of {box} can be made of {given}")


_BEFORE_ARGUMENTS = 6  # stream, function, packed metadata, launch metadata, two hooks
