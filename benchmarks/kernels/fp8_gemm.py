"""Dense block-scaled products of DeepSeek-V3: query and latent, query heads, attention's output.

Floor: the weight is read once; from some 500 rows on, the tensor cores.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import peers
from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.act_quant import Quantized, act_quant
from tidemill.kernels.cases import GEMM_GPU_CASES, GemmCase
from tidemill.kernels.fp8_gemm import fp8_gemm


def works() -> Iterator[Work]:
    for case in GEMM_GPU_CASES:
        rows, columns, depth = case.num_rows, case.num_columns, case.depth
        yield Work(
            case=f"N={columns} K={depth} M={rows}",
            build=partial(ours, case=case),
            num_bytes=columns * depth + rows * (depth + 2 * columns),
            flops=2 * rows * columns * depth,
            matmul="fp8",
            peers={"deep_gemm": partial(deep_gemm, case=case)},
        )


def ours(seed: int, case: GemmCase) -> Call:
    x, weight, scale_inv = operands(seed, case)
    return lambda: fp8_gemm(x, weight, scale_inv)


def deep_gemm(seed: int, case: GemmCase) -> Call:
    return peers.deep_gemm_dense(*operands(seed, case))


def operands(seed: int, case: GemmCase) -> tuple[Quantized, Tensor, Tensor]:
    """Products of order one."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    blocks = -(-case.num_columns // 128), case.depth // 128
    scale_inv = (random(*blocks).abs() + 0.5) / case.depth**0.5
    weight = random(case.num_columns, case.depth).to(torch.float8_e4m3fn)
    return act_quant(random(case.num_rows, case.depth).bfloat16()), weight, scale_inv
