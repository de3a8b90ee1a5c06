"""Compiles what calls would launch, beside each other and before any of it is launched.

`launches(call)` runs a call whose kernels are noted instead of compiled; `Compiler` then compiles
all that was noted, in processes of its own, by the very key under which Triton's cache is asked
when the call is made in earnest. So a kernel that spills is known before it costs device time.
"""

import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tidemill.kernels.aot import resources


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would compile it for a call."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal where Triton would compile once."""
        return repr((self.module, self.kernel, self.signature, self.constants, self.attributes,
                     self.options))  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes; `refused` says why it is none."""

    shared_bytes: int = 0  # a block
    spilled_bytes: int = 0  # a thread
    refused: str = ""

    def why_not(self, shared_limit: int) -> str:
        """Why it is not worth a launch; empty where it is."""
        if self.refused:
            return self.refused
        if self.shared_bytes > shared_limit:
            return f"{self.shared_bytes} bytes of shared memory"
        return f"spills {self.spilled_bytes} bytes a thread" if self.spilled_bytes else ""


def launches(call: Callable[[], object]) -> list[Launch]:
    """Kernels of the call that this process has not compiled yet; their outputs stay unwritten."""
    noted: list[Launch] = []

    def note(**told: Any) -> bool:
        noted.append(_launch(told))
        return True  # it is taken care of

    with _hook(note):
        call()
    return noted


@contextmanager
def _hook(hook: Callable[..., bool]) -> Iterator[None]:
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def _launch(told: dict[str, Any]) -> Launch:
    compiled = told["compile"]
    options = json.loads(compiled["specialization_data"])["options"]
    return Launch(
        module=told["fn"].module,
        kernel=told["fn"].name,
        signature=dict(compiled["signature"]),
        constants=dict(compiled["constants"]),
        attributes=dict(compiled["configs"][0]),
        options={name: _immutable(value) for name, value in options.items()},
    )


def _immutable(value: Any) -> Any:
    return tuple(map(_immutable, value)) if isinstance(value, list) else value


class Compiler:
    """Processes that compile for one target; `close` ends them."""

    def __init__(
        self,
        target: GPUTarget,
        processes: int | None = None,
        prepare: Callable[[], None] | None = None,  # for the kernels' imports, in each process
    ) -> None:
        self._target = target
        self._pool = ProcessPoolExecutor(
            processes or max(1, (os.cpu_count() or 2) - 1),
            mp_context=get_context("spawn"),
            initializer=prepare,
        )

    def refusals(
        self, arms: Sequence[tuple[Any, Sequence[Callable[[], object]]]], *, shared_limit: int
    ) -> dict[Any, str]:
        """Each arm's calls -> why it is not worth a launch, of those that are not."""
        wanted: dict[Any, list[Launch]] = {}
        told: dict[Any, str] = {}
        for arm, calls in arms:
            try:
                wanted[arm] = [launch for call in calls for launch in launches(call)]
            except Exception as error:  # what the launcher itself cannot take
                told[arm] = f"{type(error).__name__}: {error}"[:300]
        usages = self.usages(launch for found in wanted.values() for launch in found)
        for arm, found in wanted.items():
            reasons = (usages[launch.key].why_not(shared_limit) for launch in found)
            if reason := next(filter(None, reasons), ""):
                told[arm] = reason
        return told

    def usages(self, wanted: Iterable[Launch]) -> dict[str, Usage]:
        """By `Launch.key`; each key is compiled once."""
        distinct = {launch.key: launch for launch in wanted}
        made = {
            key: self._pool.submit(compile_launch, launch, self._target)
            for key, launch in distinct.items()
        }
        return {key: future.result() for key, future in made.items()}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def compile_launch(launch: Launch, target: GPUTarget) -> Usage:
    """Into Triton's cache."""
    try:
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
        source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
        made = triton.compile(source, target=target, options=launch.options)
        used = resources(made.asm["cubin"])
    except Exception as error:  # whatever the compiler says of a tile is the finding
        return Usage(refused=f"does not compile: {type(error).__name__}: {error}"[:300])
    return Usage(made.metadata.shared, used["STACK"] + used["LOCAL"])
