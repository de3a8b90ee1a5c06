"""DeepSeek-V3's router, alone and with the order by expert: 256 experts in 8 groups, 8 of 4 chosen.

Floor: a launch; the logits' bytes are below a microsecond up to 2,048 tokens. Peers: the reference,
a dozen operators of torch, and SGLang's one kernel. Choices come in another order, so results are
not compared here; tests/kernels/test_moe_route.py does.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels import peers
from benchmarks.kernels.harness import Call, Work
from tidemill.kernels.moe_route import Rule, moe_route, reference, route_and_sort

EXPERTS = 256
RULE = Rule(scoring_func="sigmoid", n_group=8, topk_group=4, top_k=8, normalize=True, scale=2.5)


def works() -> Iterator[Work]:
    top_k = RULE["top_k"]
    for num_tokens in (1, 16, 64, 256, 1024, 4096):
        build = partial(a_call, num_tokens=num_tokens)
        num_bytes = num_tokens * (4 * EXPERTS + 12 * top_k)
        yield Work(
            case=f"T={num_tokens}",
            build=partial(build, op=moe_route),
            num_bytes=num_bytes,
            peers={
                "torch": partial(build, op=reference.moe_route),
                "SGLang": partial(sglang_call, num_tokens=num_tokens),
            },
        )
        yield Work(
            case=f"T={num_tokens} sorted",
            build=partial(build, op=route_and_sort),
            num_bytes=num_bytes + 8 * EXPERTS,
        )


def inputs(seed: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(num_tokens, EXPERTS, generator=generator, device="cuda")
    return logits, torch.rand(EXPERTS, generator=generator, device="cuda") * 0.1


def sglang_call(seed: int, num_tokens: int) -> Call:
    logits, bias = inputs(seed, num_tokens)
    call = peers.sglang_route(
        logits,
        bias,
        top_k=RULE["top_k"],
        n_group=RULE["n_group"],
        topk_group=RULE["topk_group"],
        scale=RULE["scale"],
    )

    def unnamed() -> None:
        call()

    return unnamed


def a_call(seed: int, op: Callable[..., object], num_tokens: int) -> Call:
    logits, bias = inputs(seed, num_tokens)

    def call() -> None:
        op(logits, bias, **RULE)

    return call
