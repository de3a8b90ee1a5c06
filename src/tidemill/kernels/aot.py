"""Compilation ahead of time: every kernel, at every configuration it launches with, without a GPU.

An op's `kernel.py` has `variants() -> list[Variant]`. What comes out of the compiler tells what a
GPU would have told late: whether the tensor cores are used, whether registers spill.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
_KERNELS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Variant:
    """One kernel as one configuration launches it."""

    kernel: Any  # what triton.jit made of the function
    # Argument -> "*bf16", "*fp8e4nv", "*fp32", "*i32", "i32", "i64", "fp32" or "constexpr".
    signature: Mapping[str, str]
    constants: Mapping[str, object]  # the value of each "constexpr"
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] | None = None  # arguments divisible by 16; None = all pointers
    matrix: bool = False  # a kernel whose work is products: must use the tensor cores (wgmma)

    @property
    def name(self) -> str:
        """The kernel's, with what tells this variant from its others."""
        types = [kind for kind in self.signature.values() if kind.startswith("*")]
        constants = [f"{name}={value}" for name, value in self.constants.items()]
        launch = [f"warps={self.num_warps}", f"stages={self.num_stages}"]
        return f"{self.kernel.__name__}[{' '.join([*types, *constants, *launch])}]"


@dataclass(frozen=True)
class Compiled:
    """What one variant became."""

    name: str
    registers: int  # a thread
    shared_bytes: int  # a block
    spilled_bytes: int  # a thread: registers that went to memory
    has_wgmma: bool
    ptx: str = field(repr=False)
    ttgir: str = field(repr=False)  # in the order that Triton scheduled


def operators() -> list[str]:
    """Every op that has a kernel."""
    return sorted(path.parent.name for path in _KERNELS.glob("*/kernel.py"))


def variants_of(op: str) -> list[Variant]:
    """What the op's kernel.py says it launches; LookupError if it says nothing."""
    module = importlib.import_module(f"tidemill.kernels.{op}.kernel")
    found = module.variants() if hasattr(module, "variants") else []
    if not found:
        raise LookupError(f"{module.__name__} names no variants to compile")
    return list(found)


def compile_variant(variant: Variant) -> Compiled:
    """Compile for Hopper; Triton's own cache answers for sources it has seen."""
    names = variant.kernel.arg_names
    if set(names) != set(variant.signature):
        odd = sorted(set(names) ^ set(variant.signature))
        raise ValueError(f"{variant.name}: signature and kernel differ in {', '.join(odd)}")
    aligned = variant.aligned
    if aligned is None:
        aligned = tuple(name for name in names if variant.signature[name].startswith("*"))
    source = ASTSource(
        variant.kernel,
        signature={name: variant.signature[name] for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    made = triton.compile(source, target=HOPPER, options=options)
    usage = resources(made.asm["cubin"])
    return Compiled(
        name=variant.name,
        registers=usage["REG"],
        shared_bytes=made.metadata.shared,
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        has_wgmma="wgmma.mma_async" in made.asm["ptx"],
        ptx=made.asm["ptx"],
        ttgir=made.asm["ttgir"],
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What the machine code takes, as NVIDIA's own tool tells it, which Triton brings along."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(  # noqa: S603 - a fixed command on a file of our own
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
