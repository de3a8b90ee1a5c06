"""What is billed for a request whose router has vanished: a pure reading of what is left of it.

Left are the terms, the last checkpoint, and the Finals that workers still keep. What a Final counts
beyond the checkpoint is added to it; where there is no checkpoint the last Final stands alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from services.router.finish import Finish, PrefillSite
from services.router.money.counting import within_funds
from services.router.money.terms import Progress, Terms
from tidemill.billing import Reuse, Unbilled, Usage


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A prompt's split as its prefilling worker counted it."""

    prompt_tokens: int
    computed_tokens: int
    reused: Reuse
    site: PrefillSite


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnd:
    """A Final. `relayed_tokens` of the completion stood before the attempt."""

    fence: int
    attempt: int
    finish: Finish
    generated_tokens: int
    relayed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    split: Split | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """How the request is taken to have ended. Without prompt tokens nothing is billed."""

    usage: Usage
    site: PrefillSite
    finish: Finish
    attempts: int
    known_from: str  # "final", "checkpoint" or "nothing"


def decisive(progress: Progress | None, ends: Sequence[AttemptEnd]) -> bool:
    """Whether nothing that may yet be heard could say more."""
    if progress is None:
        return bool(ends)
    ended = {end.attempt for end in ends if end.fence == progress.fence}
    return ended >= progress.running.keys()


def resolve(
    terms: Terms, progress: Progress | None, ends: Sequence[AttemptEnd], *, funded_tokens: int
) -> Resolution:
    """How the request ended, by what is left of it; what nobody can tell of is lost."""
    news = {end: uncounted(progress, end) for end in ends if is_news(progress, end)}
    last = _last(progress, news)
    split = _split(terms, progress, ends)
    generated = (progress.usage.generated_tokens if progress else 0) + sum(news.values())
    completion = 0 if split is None else _completion(terms, progress, news, last)
    completion = min(completion, generated)
    usage = _usage(split, progress, ends, completion=completion, generated=generated)
    numbers = [end.attempt for end in ends] + ([progress.attempts] if progress else [])
    return Resolution(
        usage=within_funds(usage, min(funded_tokens, terms.choices * terms.max_tokens)),
        site=split.site if split else PrefillSite(),
        finish=last.finish if last else Finish.SERVER_FAULT,
        attempts=max(numbers, default=1),
        known_from="final" if last else "checkpoint" if progress else "nothing",
    )


def is_news(progress: Progress | None, end: AttemptEnd) -> bool:
    """Whether the checkpoint does not hold the whole of it."""
    return progress is None or progress.counted(end.fence, end.attempt) is not None


def uncounted(progress: Progress | None, end: AttemptEnd) -> int:
    """How many of its tokens the checkpoint does not hold."""
    if not is_news(progress, end):
        return 0
    told = progress.counted(end.fence, end.attempt) if progress else 0
    return max(end.generated_tokens - (told or 0), 0)


def with_former_ends(usage: Usage, before: Progress | None, ends: Sequence[AttemptEnd]) -> Usage:
    """`usage` after `with_redone`, and what Finals of older fences count beyond `before`."""
    news = [end for end in ends if is_news(before, end)]
    more = sum(uncounted(before, end) for end in news)
    redone = usage.unbilled.failover_redo + more
    return replace(
        usage,
        generated_tokens=usage.generated_tokens + more,
        unbilled=replace(usage.unbilled, failover_redo=redone),
        drafted_tokens=usage.drafted_tokens + sum(end.drafted_tokens for end in news),
        accepted_tokens=usage.accepted_tokens + sum(end.accepted_tokens for end in news),
    )


def _last(progress: Progress | None, news: Iterable[AttemptEnd]) -> AttemptEnd | None:
    """The latest of the stream that counts: the latest owner's, who began it anew."""
    oldest = progress.fence if progress else 0
    return max(
        (end for end in news if end.fence >= oldest),
        key=lambda end: (end.fence, end.attempt),
        default=None,
    )


def _completion(
    terms: Terms,
    progress: Progress | None,
    news: Mapping[AttemptEnd, int],
    last: AttemptEnd | None,
) -> int:
    """What a client that went on reading would have been billed for."""
    alone = 0 if last is None else last.relayed_tokens + last.generated_tokens
    if progress is None or (last is not None and last.fence > progress.fence):
        return alone
    more = sum(tokens for end, tokens in news.items() if end.fence == progress.fence)
    completion = progress.usage.completion_tokens + more
    return max(completion, alone) if terms.choices == 1 else completion


def _split(terms: Terms, progress: Progress | None, ends: Sequence[AttemptEnd]) -> Split | None:
    """The first that a router read (U2), else the first that an attempt on the bare prompt had."""
    if progress is not None and progress.usage.prompt_tokens:
        return Split(
            prompt_tokens=progress.usage.prompt_tokens,
            computed_tokens=progress.usage.computed_tokens,
            reused=progress.usage.reused,
            site=progress.site,
        )
    in_order = sorted(ends, key=lambda end: (end.fence, end.attempt))
    splits = [end.split for end in in_order if end.split and end.generated_tokens]
    return next((each for each in splits if each.prompt_tokens == terms.prompt_tokens), None)


def _usage(
    split: Split | None,
    progress: Progress | None,
    ends: Sequence[AttemptEnd],
    *,
    completion: int,
    generated: int,
) -> Usage:
    """Every token in a class: those that the checkpoint has classed there, the rest lost."""
    known = progress.usage.unbilled if progress else Unbilled()
    left = generated - completion
    redone = min(known.failover_redo, left)
    fault = min(known.server_fault, left - redone)
    drafted = sum(end.drafted_tokens for end in ends)
    accepted = sum(end.accepted_tokens for end in ends)
    if not ends and progress is not None:
        drafted, accepted = progress.usage.drafted_tokens, progress.usage.accepted_tokens
    usage = Usage(
        completion_tokens=completion,
        reasoning_tokens=min(progress.usage.reasoning_tokens if progress else 0, completion),
        generated_tokens=generated,
        unbilled=Unbilled(failover_redo=redone, server_fault=fault, lost=left - redone - fault),
        drafted_tokens=drafted,
        accepted_tokens=accepted,
    )
    if split is None:
        return usage
    return replace(
        usage,
        prompt_tokens=split.prompt_tokens,
        computed_tokens=split.computed_tokens,
        reused=split.reused,
    )
