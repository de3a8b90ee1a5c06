"""RMSNorm of DeepSeek-V3's hidden rows: alone, after the residual's sum, and quantised.

Floor: rows are read once and what is asked for written once. Peer of the plain norm: torch's own.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.rms_norm import add_rms_norm, add_rms_norm_quant, rms_norm, rms_norm_quant

HIDDEN = 7168
EPS = 1e-6
QUANTIZED = HIDDEN + HIDDEN // 32  # bytes of a row and its scales
Op = Callable[[Tensor, Tensor, Tensor], object]  # rows, residual, weight
USES: dict[str, tuple[Op, int]] = {  # and the bytes of a row that move
    "norm": (lambda x, _, weight: rms_norm(x, weight, EPS), 4 * HIDDEN),
    "add": (lambda x, other, weight: add_rms_norm(x, other, weight, EPS), 8 * HIDDEN),
    "quant": (
        lambda x, _, weight: rms_norm_quant(x, weight, EPS),
        2 * HIDDEN + QUANTIZED,
    ),
    "quant keep": (
        lambda x, _, weight: rms_norm_quant(x, weight, EPS, keep=True),
        4 * HIDDEN + QUANTIZED,
    ),
    "add quant": (
        lambda x, other, weight: add_rms_norm_quant(x, other, weight, EPS),
        6 * HIDDEN + QUANTIZED,
    ),
}


def works() -> Iterator[Work]:
    for num_rows in (1, 128, 4096):
        for name, (op, num_bytes) in USES.items():
            build = partial(a_call, num_rows=num_rows)
            yield Work(
                case=f"{name} T={num_rows}",
                build=partial(build, op=op),
                num_bytes=num_rows * num_bytes + 2 * HIDDEN,
                peers={"torch": partial(build, op=by_torch)} if name == "norm" else {},
            )


def by_torch(x: Tensor, _: Tensor, weight: Tensor) -> Tensor:
    return torch.rms_norm(x, weight.shape, weight, EPS)


def a_call(seed: int, op: Op, num_rows: int) -> Call:
    generator = torch.Generator("cuda").manual_seed(seed)
    x, residual = torch.randn(2, num_rows, HIDDEN, generator=generator, device="cuda").bfloat16()
    weight = torch.rand(HIDDEN, generator=generator, device="cuda").bfloat16()
    return lambda: op(x, residual, weight)
