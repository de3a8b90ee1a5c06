import pytest

from tidemill.api.common.v1.lifecycle_pb2 import ResolvedSampling, WorkerTask
from tidemill.engine import SamplingParams, TokenLogprobs
from tidemill.policy.seeds import choice_seed
from tidemill.worker.task import logprobs_messages, num_choices, sampling_params

SAMPLING = ResolvedSampling(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    seed=5,
    max_tokens=9,
    stop_token_ids=[1, 2],
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=-0.3,
    logit_bias={7: 1.5, 3: -2.0},
    logprobs=0,
    prompt_logprobs=4,
    min_tokens=6,
    n=3,
)


def test_every_field_reaches_the_engine() -> None:
    task = WorkerTask(sampling=SAMPLING)
    assert sampling_params(task, max_tokens=8) == SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        seed=5,
        max_tokens=8,
        min_tokens=6,
        stop_token_ids=frozenset({1, 2}),
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias=((3, -2.0), (7, 1.5)),
        logprobs=0,
        prompt_logprobs=4,
    )
    assert num_choices(task) == 3


def test_what_a_router_leaves_out_is_off() -> None:
    task = WorkerTask(sampling=ResolvedSampling(temperature=1, top_p=1, max_tokens=4))
    params = sampling_params(task, max_tokens=4)
    assert params == SamplingParams(max_tokens=4)
    assert params.is_plain
    assert num_choices(task) == 1


def test_choices_draw_with_seeds_of_their_own_and_the_first_with_the_requests() -> None:
    task = WorkerTask(sampling=SAMPLING)
    seeds = [sampling_params(task, max_tokens=8, choice=choice).seed for choice in range(3)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("seed", "choice", "expected"),
    [(0, 1, 0xE87D7D14C49D7F7B), (12345, 1, 0xEAA8B9DA961FB209), (12345, 15, 0x0FAFE56CBFE90DC1)],
)
def test_seeds_of_choices_are_pinned_across_releases(seed: int, choice: int, expected: int) -> None:
    assert choice_seed(seed, choice) == expected


def test_a_resumed_prompt_is_not_scored_again() -> None:
    task = WorkerTask(sampling=SAMPLING, relayed_tokens=2)
    assert sampling_params(task, max_tokens=8).prompt_logprobs is None


def test_logprobs_keep_their_order_on_the_wire() -> None:
    (message,) = logprobs_messages([None, TokenLogprobs(-0.5, (4, 9), (-0.5, -1.25))])
    assert message.logprob == -0.5
    assert list(message.top_token_ids) == [4, 9]
    assert list(message.top_logprobs) == [-0.5, -1.25]
