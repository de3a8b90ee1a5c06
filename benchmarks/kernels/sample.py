"""Drawing tokens: DeepSeek-V3's vocabulary, plain rows and rows with top-k and top-p.

Floor: the logits are read once. The noise of every token kept takes two fp64 logarithms and top-p
an exponential, which the floor leaves out. No peer: none draws in fp64 from a keyed noise.
"""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.cases import SAMPLE_GPU_CASES, SampleCase
from tidemill.kernels.sample import Draws, sample


def works() -> Iterator[Work]:
    for case, (top_k, top_p) in product(SAMPLE_GPU_CASES, ((0, 1.0), (50, 0.95))):
        yield Work(
            case=f"B={case.num_rows} top_k={top_k} top_p={top_p}",
            build=partial(a_draw, case=case, top_k=top_k, top_p=top_p),
            num_bytes=case.num_rows * (case.num_tokens * 2 + 8),
        )


def a_draw(seed: int, case: SampleCase, top_k: int, top_p: float) -> Call:
    """A call on logits as peaked as a trained model's."""
    num_rows = case.num_rows
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(num_rows, case.num_tokens, generator=generator, device="cuda") * 3

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device="cuda")

    draws = Draws(
        temperature=column(0.8, torch.double),
        top_k=column(top_k, torch.int32),
        top_p=column(top_p, torch.double),
        min_p=column(0.0, torch.double),
        seeds=torch.arange(num_rows, device="cuda") + seed,
        positions=torch.arange(num_rows, device="cuda") * 17,
    )
    rows = logits.bfloat16()
    return lambda: sample(rows, draws)
