from services.router.keys import Tenant
from services.router.money.refusals import max_cost_exceeded, refusal
from tidemill.billing import Prices
from tidemill.billing import ledger as rules
from tidemill.billing.hold_size import HoldSize
from tidemill.errors import InsufficientBalance, LimitExceeded

ACME = Tenant("acme", "USD", bytes(32))


def refused(reason: rules.Reason, limit: str, scope: str, resets_at_ms: int) -> LimitExceeded:
    reply = rules.Refused(reason, limit, scope, resets_at_ms, 500, 200)
    error = refusal(reply, ACME, 10_000)
    assert isinstance(error, LimitExceeded)
    return error


def test_an_empty_account_says_what_it_has_and_what_is_needed() -> None:
    reply = rules.Refused(rules.Reason.INSUFFICIENT_BALANCE, "", "", 0, 500, 200)
    error = refusal(reply, ACME, 10_000)
    assert isinstance(error, InsufficientBalance)
    assert error.metadata == {"need_nano": "500", "available_nano": "200", "currency": "USD"}
    assert error.retry_after_s is None


def test_a_rate_limit_says_whose_it_is_and_when_it_ends() -> None:
    error = refused(rules.Reason.RATE_LIMITED, "requests_per_minute", rules.TENANT, 12_500)
    assert (error.reason, error.retry_after_s) == ("RATE_LIMITED", 2.5)
    assert error.quotas == [("tenant:acme", "requests per minute")]
    assert error.metadata == {"limit": "requests_per_minute", "resets_at_ms": "12500"}
    assert str(error).startswith(
        "requests per minute of tenant:acme used up until 1970-01-01T00:00:12.500Z"
    )


def test_a_limit_on_concurrency_ends_when_others_do() -> None:
    error = refused(rules.Reason.CONCURRENCY_LIMITED, "concurrency", rules.key_scope("k1"), 0)
    assert (error.reason, error.quotas[0][0]) == ("CONCURRENCY_LIMITED", "key:k1")
    assert error.retry_after_s == 1.0
    assert "until" not in str(error)


def test_a_budget_says_what_is_left_of_it() -> None:
    error = refused(rules.Reason.BUDGET_EXCEEDED, "daily_budget_nano", rules.TENANT, 86_400_000)
    assert error.reason == "BUDGET_EXCEEDED"
    assert (error.metadata["need_nano"], error.metadata["available_nano"]) == ("500", "200")
    assert "until 1970-01-02T00:00:00.000Z" in str(error)
    assert "0.000000200 USD left, the request needs 0.000000500 USD" in str(error)


def test_a_bound_that_is_too_low_says_the_least_in_the_accounts_currency() -> None:
    size = HoldSize(
        prices=Prices(hit=1000, miss=2000, output=3000),
        prompt_tokens=10,
        max_tokens=8,
        first_tokens=2,
        cap_nano=25,
    )
    error = max_cost_exceeded(size, "USD")
    assert error.reason == "MAX_COST_EXCEEDED"
    assert error.metadata == {"currency": "USD", "least_nano": "26", "max_cost_nano": "25"}
    assert "takes 0.000000026 USD, max_cost is 0.000000025 USD" in str(error)
