"""A WorkerTask in the engine's terms."""

from tidemill.api.common.v1.lifecycle_pb2 import AttemptId, WorkerTask
from tidemill.engine import SamplingParams

AttemptKey = tuple[str, int, int]


def attempt_key(attempt: AttemptId) -> AttemptKey:
    """(request id, fence, attempt): what names one attempt on a worker."""
    return attempt.request_id, attempt.fence, attempt.attempt


def sampling_params(task: WorkerTask, *, max_tokens: int) -> SamplingParams:
    """The engine's form of a task's sampling, with `max_tokens` left to generate."""
    sampling = task.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(sampling.stop_token_ids),
    )


def microseconds(seconds: float) -> int:
    """For the wire; clocks may run a hair behind each other, durations never below 0."""
    return max(round(seconds * 1e6), 0)
