"""A WorkerTask in the engine's terms, and what the engine reports in the wire's."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tidemill.api.common.v1 import logprobs_pb2
from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, PrefillDone, WorkerTask
from tidemill.engine import PrefilledOutput, SamplingParams, TokenLogprobs
from tidemill.engine import Sequence as SequenceInEngine
from tidemill.policy.seeds import choice_seed

if TYPE_CHECKING:  # it imports xgrammar, which only workers that follow grammars pay for
    from tidemill.engine.grammar import Grammar

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


def sequence_of(
    seq_id: str,
    task: WorkerTask,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    first_token_ids: Sequence[int] = (),
    root: bytes,
    num_relayed_tokens: int,
    grammar: "Grammar | None" = None,
    **of_parent: Any,
) -> SequenceInEngine:
    """The task's first choice with the others as its forks.

    Each has `max_tokens` left to generate, and `first_token_ids` if the prompt was prefilled
    elsewhere. `of_parent` are further arguments of the first one's sequence.
    """
    stop_ids = task.sampling.stop_token_ids

    def choice(index: int, **fields: Any) -> SequenceInEngine:
        return SequenceInEngine(
            f"{seq_id} {index}" if index else seq_id,
            prompt,
            sampling=sampling_params(task, max_tokens=max_tokens, choice=index),
            first_token_id=first_token_ids[index] if first_token_ids else None,
            num_relayed_tokens=num_relayed_tokens,
            root=root,
            constraint=None
            if grammar is None
            else grammar.constraint(
                prompt, num_relayed_tokens=num_relayed_tokens, stop_token_ids=stop_ids
            ),
            **fields,
        )

    forks = [choice(index) for index in range(1, num_choices(task))]
    return choice(0, forks=forks, **of_parent)


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


def prefill_done(output: PrefilledOutput, **fields: Any) -> PrefillDone:
    """A finished prefill for the wire, first tokens and log-probabilities filled in."""
    drawn = output.first_tokens
    return PrefillDone(
        first_token_id=drawn[0].token_id,
        first_token_ids=[each.token_id for each in drawn] if len(drawn) > 1 else [],
        first_logprobs=logprobs_messages(each.logprobs for each in drawn),
        prompt_logprobs=logprobs_messages(output.prompt_logprobs),
        **fields,
    )


def microseconds(seconds: float) -> int:
    """For the wire; clocks may run a hair behind each other, durations never below 0."""
    return max(round(seconds * 1e6), 0)
