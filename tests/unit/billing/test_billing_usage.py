"""U1, U2 and M4: what a Usage may say, and what of it is a billed hit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.billing import Reuse, Unbilled, Usage
from tidemill.errors import UsageError

counts = st.integers(0, 10**6)


def test_an_unused_request_is_all_zero() -> None:
    usage = Usage()
    assert (usage.prompt_tokens, usage.cache_hit_tokens, usage.cache_miss_tokens) == (0, 0, 0)


def test_u1_prompt_must_be_computed_plus_reused() -> None:
    with pytest.raises(UsageError, match="U1 does not hold: prompt 100 != computed 35 \\+ reused"):
        Usage(prompt_tokens=100, computed_tokens=35, reused=Reuse(device=64))


def test_m4_generated_must_be_billed_plus_unbilled() -> None:
    with pytest.raises(UsageError, match="M4 does not hold: generated 12 != billed 10"):
        Usage(completion_tokens=10, generated_tokens=12, unbilled=Unbilled(overrun=1))


def test_m4_accepted_drafts_are_at_most_the_drafted() -> None:
    assert Usage(drafted_tokens=7, accepted_tokens=7).accepted_tokens == 7
    with pytest.raises(UsageError, match="accepted 8 > drafted 7"):
        Usage(drafted_tokens=7, accepted_tokens=8)


def test_reasoning_is_part_of_the_completion() -> None:
    with pytest.raises(UsageError, match="reasoning 3 exceeds completion 2"):
        Usage(completion_tokens=2, generated_tokens=2, reasoning_tokens=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Usage(prompt_tokens=-1, computed_tokens=-1),
        lambda: Reuse(peer=-64),
        lambda: Unbilled(lost=-1),
    ],
)
def test_a_negative_count_is_refused(make: type[Usage]) -> None:
    with pytest.raises(UsageError, match="is negative"):
        make()


@pytest.mark.parametrize("count", [64.0, True, "64", None])
def test_a_count_that_is_no_int_is_a_type_error(count: object) -> None:
    with pytest.raises(TypeError, match=r"Reuse\.device must be an int"):
        Reuse(device=count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Usage\.completion_tokens must be an int"):
        Usage(completion_tokens=count)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "reused", "billed_hits"),
    [
        (63, 0, 0),
        (64, 64, 0),  # the last prompt token is never a hit
        (65, 64, 64),
        (128, 128, 64),
        (129, 128, 128),
        (1000, 127, 64),  # a part of a block is reuse, not a billed hit
        (1000, 63, 0),
    ],
)
def test_u2_hits_are_whole_blocks_short_of_the_last_token(
    prompt: int, reused: int, billed_hits: int
) -> None:
    usage = Usage(
        prompt_tokens=prompt, computed_tokens=prompt - reused, reused=Reuse(device=reused)
    )
    assert usage.cache_hit_tokens == billed_hits
    assert usage.cache_miss_tokens == prompt - billed_hits


@given(computed=counts, tiers=st.tuples(counts, counts, counts, counts, counts))
def test_u2_holds_for_every_split_over_tiers(
    computed: int, tiers: tuple[int, int, int, int, int]
) -> None:
    device, host, cache_ram, cache_disk, peer = tiers
    reuse = Reuse(device=device, host=host, cache_ram=cache_ram, cache_disk=cache_disk, peer=peer)
    usage = Usage(prompt_tokens=computed + sum(tiers), computed_tokens=computed, reused=reuse)
    assert reuse.total == sum(tiers)
    assert usage.cache_hit_tokens % 64 == 0
    assert usage.cache_hit_tokens <= reuse.total
    assert usage.cache_hit_tokens <= max(usage.prompt_tokens - 1, 0)
    assert usage.cache_hit_tokens + usage.cache_miss_tokens == usage.prompt_tokens
    # and no whole block that could be billed as a hit is withheld
    assert usage.cache_hit_tokens > min(reuse.total, usage.prompt_tokens - 1) - 64
