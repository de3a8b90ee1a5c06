from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from tests.engine_harness import load_engine, run_all
from tests.tiny_model import make_tiny_checkpoint
from tidemill.engine import Engine, PrefilledOutput, SamplingParams, Sequence, TokensOutput
from tidemill.engine.logprobs import (
    TokenLogprobs,
    logprobs_together,
    prompt_logprobs,
    token_logprobs,
)

PROMPT = list(range(100, 170))
TOP = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("logprobs"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return load_engine(folder, step_tokens=32)  # the prompt takes three steps


@pytest.fixture(scope="module")
def reference(folder: Path) -> DeepseekV3ForCausalLM:
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(engine: Engine, sampling: SamplingParams) -> tuple[PrefilledOutput, list[TokensOutput]]:
    blocks = engine.pool.allocate(-(-len(PROMPT) // 64))
    seq = Sequence("s", PROMPT, block_table=blocks, sampling=sampling)
    engine.submit(seq)
    outputs = run_all(engine)
    engine.pool.release(seq.block_table)
    (prefilled,) = [output for output in outputs if isinstance(output, PrefilledOutput)]
    return prefilled, [output for output in outputs if isinstance(output, TokensOutput)]


@torch.inference_mode()
def expected(reference: DeepseekV3ForCausalLM, ids: list[int]) -> Tensor:
    """Log-probabilities [T, V] of what follows each position."""
    logits: Tensor = reference(torch.tensor([ids])).logits[0]
    return logits.float().log_softmax(-1)


def check(found: list[TokenLogprobs], rows: Tensor, ids: list[int], top: int) -> None:
    assert len(found) == len(ids)
    for one, row, token_id in zip(found, rows, ids, strict=True):
        assert one.logprob == pytest.approx(float(row[token_id]), abs=2e-3)
        likeliest = row.topk(top)
        assert one.top_logprobs == pytest.approx(likeliest.values.tolist(), abs=2e-3)
        for token, value in zip(one.top_token_ids, one.top_logprobs, strict=True):
            assert value == pytest.approx(float(row[token]), abs=2e-3)


@pytest.mark.parametrize("sampling", [
    SamplingParams(temperature=0.0, max_tokens=8, logprobs=TOP),
    SamplingParams(
        temperature=1.7, seed=4, top_k=40, max_tokens=8, logprobs=TOP, presence_penalty=1.5,
        logit_bias=((7, 50.0),),
    ),
], ids=["greedy", "what is drawn from is no longer what is reported"])  # fmt: skip
def test_completion_logprobs_are_those_of_the_models_own_logits(
    engine: Engine, reference: DeepseekV3ForCausalLM, sampling: SamplingParams
) -> None:
    prefilled, outputs = run(engine, sampling)
    ids = [token for output in outputs for token in output.token_ids]
    found = [one for output in outputs for one in output.logprobs]
    rows = expected(reference, PROMPT + ids)[len(PROMPT) - 1 : -1]
    check(found, rows, ids, TOP)
    assert prefilled.first_tokens[0].logprobs == found[0]


def test_prompt_logprobs_are_those_of_the_whole_prompt_whatever_the_chunks(
    engine: Engine, reference: DeepseekV3ForCausalLM
) -> None:
    prefilled, outputs = run(engine, SamplingParams(max_tokens=2, prompt_logprobs=TOP))
    rows = expected(reference, PROMPT)[:-1]
    check(prefilled.prompt_logprobs, rows, PROMPT[1:], TOP)
    assert outputs[0].logprobs == []


def test_nobody_pays_for_logprobs_that_nobody_asked_for(engine: Engine) -> None:
    prefilled, outputs = run(engine, SamplingParams(max_tokens=2))
    assert prefilled.prompt_logprobs == []
    assert [output.logprobs for output in outputs] == [[], []]


def test_of_equal_alternatives_the_lowest_ids_come_first() -> None:
    found = token_logprobs(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 2.0]), 5, 4)
    assert found.top_token_ids == (1, 3, 2, 4)
    assert found.top_logprobs[2] == found.logprob


def test_no_more_alternatives_than_tokens() -> None:
    assert token_logprobs(torch.zeros(3), 0, 20).top_token_ids == (0, 1, 2)
    assert token_logprobs(torch.zeros(3), 0, 0).top_token_ids == ()


def test_a_long_prompt_never_has_all_its_logits_at_once() -> None:
    asked: list[int] = []

    def logits_of(hidden: Tensor) -> Tensor:
        asked.append(len(hidden))
        return hidden @ torch.eye(8)

    hidden = torch.randn(500, 8, generator=torch.manual_seed(1))
    found = prompt_logprobs(logits_of, hidden, [3] * 500, 1)
    assert sum(asked) == 500
    assert max(asked) <= 32
    assert [one.logprob for one in found] == hidden.log_softmax(-1)[:, 3].tolist()


def test_rows_sorted_together_tell_what_each_alone_does() -> None:
    """Ties go to low ids, and each row has as many alternatives as it asked for."""
    logits = torch.randint(0, 9, (4, 50), generator=torch.manual_seed(3)).float()
    logits[2, 7:] = -torch.inf
    token_ids, tops = [0, 49, 3, 20], [5, 0, 50, 1]
    alone = [
        token_logprobs(row, token_id, top)
        for row, token_id, top in zip(logits, token_ids, tops, strict=True)
    ]
    assert logprobs_together(logits, token_ids, tops) == alone
