from random import Random

import pytest

from tidemill import errors
from tidemill.client import RetryPolicy
from tidemill.client.retry import Attempts

POLICY = RetryPolicy()


@pytest.mark.parametrize("retries", range(8))
def test_back_off_doubles_from_half_a_second_to_eight_with_jitter(retries: int) -> None:
    policy = RetryPolicy(max_retries=100)
    delays = [
        policy.delay_s(errors.Unavailable("x"), retries=retries, rng=Random(seed)) or 0.0
        for seed in range(50)
    ]
    top = min(8.0, 0.5 * 2**retries)
    assert all(0.75 * top <= delay <= top for delay in delays)
    assert len(set(delays)) > 40


def test_retry_info_goes_before_the_back_off_and_is_never_undercut() -> None:
    error = errors.QueueFull("full", retry_after_s=3.0)
    for seed in range(50):
        delay = POLICY.delay_s(error, retries=0, rng=Random(seed))
        assert delay is not None
        assert 3.0 <= delay <= 3.75


@pytest.mark.parametrize(
    "error",
    [
        errors.ResourceExhausted("message larger than max"),
        errors.LimitExceeded("100 at once"),
        errors.DeadlineExceeded("late"),
        errors.Internal("a surprise"),
        errors.Cancelled("gone"),
        errors.RequestInProgress("served elsewhere", retry_after_s=1.0),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_waiting_cannot_mend_is_not_retried(error: errors.TidemillError) -> None:
    assert POLICY.delay_s(error, retries=0, rng=Random(0)) is None


def test_a_predecessor_in_progress_is_waited_for_beyond_the_count() -> None:
    error = errors.RequestInProgress("served elsewhere", retry_after_s=1.0)
    assert POLICY.delay_s(error, retries=50, rng=Random(0)) is not None


def test_attempts_share_one_deadline() -> None:
    now = [100.0]
    attempts = Attempts(POLICY, Random(0), timeout_s=10.0, clock=lambda: now[0])
    attempts.delay_s(errors.Unavailable("x"))
    now[0] = 109.9
    assert attempts.remaining_s() == pytest.approx(0.1)
    with pytest.raises(errors.Unavailable):
        attempts.delay_s(errors.Unavailable("x"))


def test_a_server_that_cancels_what_it_has_not_begun_is_one_that_goes_away() -> None:
    attempts = Attempts(RetryPolicy(max_retries=1), Random(0), timeout_s=10.0)
    cancelled = errors.Cancelled("CANCELLED", request_id="r1")
    assert attempts.delay_s(cancelled) < 0.2
    with pytest.raises(errors.Unavailable) as raised:
        attempts.delay_s(cancelled)
    assert raised.value.request_id == "r1"


def test_a_call_that_is_not_repeatable_has_one_attempt() -> None:
    attempts = Attempts(POLICY, Random(0), timeout_s=10.0, repeatable=False)
    with pytest.raises(errors.Unavailable):
        attempts.delay_s(errors.Unavailable("x"))


def test_each_wait_is_told_before_it_begins_and_a_refusal_is_none() -> None:
    told: list[tuple[errors.TidemillError, float]] = []
    policy = RetryPolicy(max_retries=1, on_wait=lambda error, wait_s: told.append((error, wait_s)))
    attempts = Attempts(policy, Random(0), timeout_s=100.0)
    error = errors.QueueFull("full", retry_after_s=3.0)
    delay_s = attempts.delay_s(error)
    with pytest.raises(errors.QueueFull):
        attempts.delay_s(error)
    assert told == [(error, delay_s)]
