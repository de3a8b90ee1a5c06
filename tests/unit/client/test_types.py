from dataclasses import replace

import pytest

from tidemill.client import Reuse, Unbilled, Usage
from tidemill.errors import UsageError

GOOD = Usage(
    prompt_tokens=200,
    cache_hit_tokens=128,
    cache_miss_tokens=72,
    completion_tokens=9,
    computed_tokens=72,
    reuse=Reuse(host=64, peer=64),
    generated_tokens=12,
    unbilled=Unbilled(overrun=3),
)


def test_true_usage_passes() -> None:
    GOOD.check()
    Usage().check()


@pytest.mark.parametrize(
    ("usage", "number"),
    [
        (replace(GOOD, computed_tokens=71), "U1"),
        (replace(GOOD, reuse=Reuse(host=64)), "U1"),
        (replace(GOOD, cache_hit_tokens=192, cache_miss_tokens=8), "U2"),
        (replace(GOOD, cache_hit_tokens=100, cache_miss_tokens=100), "U2"),
        (replace(GOOD, cache_hit_tokens=64, cache_miss_tokens=136), "U2"),
        (replace(GOOD, cache_miss_tokens=73), "U2"),
        (
            replace(
                GOOD,
                prompt_tokens=128,
                computed_tokens=0,
                cache_hit_tokens=128,
                cache_miss_tokens=0,
            ),
            "U2",
        ),
        (replace(GOOD, generated_tokens=11), "M4"),
        (replace(GOOD, accepted_tokens=1), "M4"),
    ],
)
def test_broken_usage_names_the_invariant(usage: Usage, number: str) -> None:
    with pytest.raises(UsageError, match=f"{number} does not hold"):
        usage.check()
