"""The sampler's way on a GPU, all rows in one launch, draws what its way on a CPU draws."""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tidemill.engine.sampling import Drawn, SamplingParams, draw
from tidemill.engine.sequence import Sequence
from tidemill.kernels import choice

V = 120
PLAIN = SamplingParams(seed=2**64 - 1, temperature=0.8, top_p=0.9)
PENALISED = SamplingParams(
    seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, top_k=20
)
BIASED = SamplingParams(
    seed=6, logit_bias=((3, 5.0), (4, -100.0)), min_tokens=9, stop_token_ids=frozenset({7, 500})
)
GREEDY = SamplingParams(temperature=0, presence_penalty=0.5, logprobs=2)


class Only:
    """A constraint: these tokens."""

    def __init__(self, *token_ids: int) -> None:
        self.mask = torch.zeros(V, dtype=torch.bool)
        self.mask[list(token_ids)] = True

    def allowed(self, token_ids: Many[int]) -> Tensor | None:  # noqa: ARG002 - a protocol's
        return self.mask


def sequences() -> list[Sequence]:
    made = []
    for params in (PLAIN, PENALISED, BIASED, GREEDY, PLAIN, PLAIN):
        seq = Sequence("s", [1, 2, 3, 2], block_table=[], sampling=params)
        seq.token_ids += [5, 5, 9]
        made.append(seq)
    made[4].constraint = Only(11, 12, 13)
    made[5].constraint = Only()
    return made


def drawn(logits: Tensor, path: choice.Path) -> list[Drawn]:
    with choice.forced(path):
        return draw(logits, sequences())


def test_one_launch_draws_what_row_by_row_draws() -> None:
    for seed in range(8):
        logits = torch.randn(6, V, generator=torch.manual_seed(seed)) * 2
        apart, together = drawn(logits, "reference"), drawn(logits, "triton")
        assert together == apart
        assert together[5].dead_end
        assert together[4].token_id in {11, 12, 13}
        assert together[3].logprobs is not None
