"""Rounding activations to FP8 at DeepSeek-V3's widths, plain and after SwiGLU.

Floor: bf16 rows are read once, e4m3 values and a scale for each 128 of them written once. Peer: the
reference, several passes of torch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.act_quant import Quantized, act_quant, reference, swiglu_quant

HIDDEN, WIDTH = 7168, 2048


def works() -> Iterator[Work]:
    for num_rows, dim in product((1, 128, 4096), (HIDDEN, WIDTH)):
        yield Work(
            case=f"T={num_rows} D={dim}",
            build=partial(a_call, op=act_quant, num_rows=num_rows, dim=dim),
            num_bytes=num_rows * (2 * dim + dim + dim // 32),
            peers={"torch": partial(a_call, op=reference.act_quant, num_rows=num_rows, dim=dim)},
        )
    for num_rows in (128, 4096, 32768):
        gated = partial(a_call, num_rows=num_rows, dim=2 * WIDTH)
        yield Work(
            case=f"SwiGLU T={num_rows} D={WIDTH}",
            build=partial(gated, op=swiglu_quant),
            num_bytes=num_rows * (4 * WIDTH + WIDTH + WIDTH // 32),
            peers={"torch": partial(gated, op=reference.swiglu_quant)},
        )


def a_call(seed: int, op: Callable[[Tensor], Quantized], num_rows: int, dim: int) -> Call:
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(num_rows, dim, generator=generator, device="cuda").bfloat16()
    return lambda: op(rows).scales
