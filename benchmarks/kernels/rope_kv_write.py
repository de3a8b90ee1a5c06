"""What stands between attention's projections and attention, at DeepSeek-V3's 128 heads.

Floor: the queries' RoPE part is read and written, the latents' rows are read and stored. Peer: the
reference, the operators of torch that this one launch replaces.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.rope_kv_write import reference, rope_kv_write

HEADS, NOPE, ROPE, LORA = 128, 128, 64, 512
EPS = 1e-6


def works() -> Iterator[Work]:
    for num_rows in (1, 128, 4096):
        yield Work(
            case=f"T={num_rows} H={HEADS}",
            build=partial(a_call, op=rope_kv_write, num_rows=num_rows),
            num_bytes=num_rows * (4 * HEADS * ROPE + 4 * (LORA + ROPE) + 4 * ROPE + 8),
            peers={"torch": partial(a_call, op=reference.rope_kv_write, num_rows=num_rows)},
        )


def a_call(seed: int, op: Callable[..., None], num_rows: int) -> Call:
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    query = random(num_rows, HEADS, NOPE + ROPE).bfloat16()
    kv_a, weight = random(num_rows, LORA + ROPE).bfloat16(), random(LORA).bfloat16()
    angles = random(num_rows, ROPE // 2)
    rotation = torch.polar(torch.ones_like(angles), angles)
    pool = torch.zeros(num_rows // 64 + 1, 64, LORA + ROPE, dtype=torch.bfloat16, device="cuda")
    slots = torch.randperm(num_rows, generator=generator, device="cuda")
    return lambda: op(query, kv_a, weight, EPS, rotation, pool, slots, None, decoding=None)
