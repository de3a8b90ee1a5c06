"""A WorkerTask in the engine's terms, and what the engine reports in the wire's."""

from collections.abc import Iterable

from tidemill.api.common.v1 import logprobs_pb2
from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, WorkerTask
from tidemill.engine import SamplingParams, TokenLogprobs
from tidemill.policy.seeds import choice_seed

AttemptKey = tuple[str, int, int]


def attempt_key(attempt: AttemptId) -> AttemptKey:
    """(request id, fence, attempt): what names one attempt on a worker."""
    return attempt.request_id, attempt.fence, attempt.attempt


def num_choices(task: WorkerTask) -> int:
    """Completions of the prompt."""
    return max(task.sampling.n, 1)


def sampling_params(task: WorkerTask, *, max_tokens: int, choice: int = 0) -> SamplingParams:
    """How one choice draws its tokens, with `max_tokens` left to generate.

    Where earlier attempts have relayed tokens they have scored the prompt too.
    """
    sampling = task.sampling
    scores_prompt = sampling.HasField("prompt_logprobs") and not task.relayed_tokens
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=choice_seed(sampling.seed, choice),
        max_tokens=max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        repetition_penalty=sampling.repetition_penalty or 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=tuple(sorted(sampling.logit_bias.items())),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        prompt_logprobs=sampling.prompt_logprobs if scores_prompt else None,
    )


def logprobs_messages(
    found: Iterable[TokenLogprobs | None],
) -> list[logprobs_pb2.TokenLogprobs]:
    """For the wire; empty where none were asked for."""
    return [
        logprobs_pb2.TokenLogprobs(
            logprob=one.logprob, top_token_ids=one.top_token_ids, top_logprobs=one.top_logprobs
        )
        for one in found
        if one is not None
    ]


def microseconds(seconds: float) -> int:
    """For the wire; clocks may run a hair behind each other, durations never below 0."""
    return max(round(seconds * 1e6), 0)
