"""Usage over several owners and within what was paid for. Pure; every token stays in some class."""

from dataclasses import replace

from tidemill.billing import Unbilled, Usage


def with_redone(usage: Usage, before: Usage) -> Usage:
    """`usage` and what came of the owner before, all of whose tokens are generated anew.

    The prompt's split is the first one (U2), where a prompt is billed at all.
    """
    unbilled, earlier = usage.unbilled, before.unbilled
    whole = replace(
        usage,
        generated_tokens=usage.generated_tokens + before.generated_tokens,
        unbilled=Unbilled(
            overrun=unbilled.overrun + earlier.overrun,
            failover_redo=(
                unbilled.failover_redo + earlier.failover_redo + before.completion_tokens
            ),
            lost=unbilled.lost + earlier.lost,
            server_fault=unbilled.server_fault + earlier.server_fault,
        ),
        drafted_tokens=usage.drafted_tokens + before.drafted_tokens,
        accepted_tokens=usage.accepted_tokens + before.accepted_tokens,
    )
    if not (usage.prompt_tokens and before.prompt_tokens):
        return whole
    return replace(
        whole,
        prompt_tokens=before.prompt_tokens,
        computed_tokens=before.computed_tokens,
        reused=before.reused,
    )


def within_funds(usage: Usage, funded_tokens: int) -> Usage:
    """At most `funded_tokens` billed; what a worker generated beyond them is overrun (M4)."""
    beyond = usage.completion_tokens - funded_tokens
    if beyond <= 0:
        return usage
    return replace(
        usage,
        completion_tokens=funded_tokens,
        reasoning_tokens=min(usage.reasoning_tokens, funded_tokens),
        unbilled=replace(usage.unbilled, overrun=usage.unbilled.overrun + beyond),
    )


def written_off(usage: Usage) -> Usage:
    """Nothing billed: what would have been is the server's fault."""
    fault = usage.unbilled.server_fault + usage.completion_tokens
    return Usage(
        generated_tokens=usage.generated_tokens,
        unbilled=replace(usage.unbilled, server_fault=fault),
        drafted_tokens=usage.drafted_tokens,
        accepted_tokens=usage.accepted_tokens,
    )
