from hypothesis import given
from hypothesis import strategies as st

from services.router.money.counting import with_redone, within_funds, written_off
from tidemill.billing import Reuse, Unbilled, Usage

counts = st.integers(0, 1000)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    unbilled = Unbilled(**{name: draw(counts) for name in ("overrun", "lost", "server_fault")})
    completion, computed, host = draw(counts), draw(counts), draw(counts)
    return Usage(
        prompt_tokens=computed + host,
        computed_tokens=computed,
        reused=Reuse(host=host),
        completion_tokens=completion,
        reasoning_tokens=completion // 2,
        generated_tokens=completion + unbilled.total,
        unbilled=unbilled,
    )


@given(usages(), counts)
def test_what_is_not_funded_is_overrun(usage: Usage, funded: int) -> None:
    bounded = within_funds(usage, funded)
    assert bounded.completion_tokens == min(usage.completion_tokens, funded)
    assert bounded.generated_tokens == usage.generated_tokens


@given(usages(), usages())
def test_a_former_owners_tokens_are_done_again_and_its_split_stands(
    usage: Usage, before: Usage
) -> None:
    whole = with_redone(usage, before)
    assert whole.completion_tokens == usage.completion_tokens
    assert whole.generated_tokens == usage.generated_tokens + before.generated_tokens
    assert whole.unbilled.failover_redo == before.completion_tokens
    if usage.prompt_tokens and before.prompt_tokens:
        assert (whole.prompt_tokens, whole.reused) == (before.prompt_tokens, before.reused)
    else:
        assert whole.prompt_tokens == usage.prompt_tokens


@given(usages())
def test_what_is_written_off_bills_nothing_and_forgets_nothing(usage: Usage) -> None:
    off = written_off(usage)
    assert (off.prompt_tokens, off.completion_tokens) == (0, 0)
    assert off.generated_tokens == usage.generated_tokens
