from hypothesis import given
from hypothesis import strategies as st

from tidemill.billing.hold_size import STEP_TOKENS, HoldSize
from tidemill.billing.prices import Prices

price = st.integers(0, 5_000_000)
tokens = st.integers(1, 100_000)

sizes = st.builds(
    HoldSize,
    prices=st.builds(Prices, hit=st.just(0), miss=price, output=price),
    prompt_tokens=tokens,
    max_tokens=tokens,
    cap_nano=st.none() | st.integers(0, 10**9),
)


def size(*, max_tokens: int = 4096, cap_nano: int | None = None) -> HoldSize:
    prices = Prices(hit=70_000, miss=270_000, output=1_100_000)
    return HoldSize(prices=prices, prompt_tokens=1000, max_tokens=max_tokens, cap_nano=cap_nano)


def charged(held: HoldSize, completion_tokens: int) -> int:
    pico = held.prompt_tokens * held.prices.miss + completion_tokens * held.prices.output
    return (pico + 500) // 1000


def test_full_hold_pays_for_the_prompt_at_the_miss_price_and_all_of_max_tokens() -> None:
    assert size().full_nano == 270_000 + 4096 * 1100


def test_least_hold_pays_for_the_prompt_and_512_tokens() -> None:
    assert size().least_nano == 270_000 + 512 * 1100
    assert size(max_tokens=10).least_nano == 270_000 + 10 * 1100


def test_a_cap_bounds_both_and_is_refused_only_if_it_does_not_pay_for_one_token() -> None:
    assert size(cap_nano=500_000).full_nano == 500_000
    assert size(cap_nano=271_100).sufficient_cap
    assert size(cap_nano=271_100).funded_tokens(271_100) == 1
    assert not size(cap_nano=271_099).sufficient_cap


def test_no_hold_is_larger_than_the_ledger_counts() -> None:
    dear = HoldSize(prices=Prices(0, 1, 10**17), prompt_tokens=1, max_tokens=1000)
    assert dear.full_nano == dear.least_nano == dear.most_nano == 2**53 - 1
    assert dear.sufficient_cap
    assert dear.step_nano(dear.full_nano) == 0
    beyond = HoldSize(prices=Prices(0, 10**19, 0), prompt_tokens=1, max_tokens=1)
    assert not beyond.sufficient_cap


def test_amounts_are_rounded_up_to_a_nano() -> None:
    one = HoldSize(prices=Prices(0, 1, 0), prompt_tokens=1, max_tokens=1)
    assert one.full_nano == 1


def test_steps_are_512_tokens_and_end_at_max_tokens_or_the_cap() -> None:
    held = size(max_tokens=1000)
    assert held.step_nano(held.least_nano) == (1000 - 512) * 1100
    assert held.step_nano(held.full_nano) == 0
    capped = size(cap_nano=size().least_nano + 5 * 1100)
    assert capped.funded_tokens(capped.least_nano + capped.step_nano(capped.least_nano)) == 517
    assert capped.step_nano(capped.full_nano) == 0


@given(sizes, st.integers(0, 10**12))
def test_what_is_funded_is_never_charged_above_what_is_held(held: HoldSize, amount: int) -> None:
    funded = held.funded_tokens(amount)
    assert 0 <= funded <= held.max_tokens
    if amount >= held.first_nano:
        assert charged(held, funded) <= amount


@given(sizes)
def test_extending_reaches_all_of_max_tokens_or_the_cap_and_stops(held: HoldSize) -> None:
    if not held.sufficient_cap:
        return
    amount = held.least_nano
    for _ in range(held.max_tokens // STEP_TOKENS + 2):
        before = held.funded_tokens(amount)
        step = held.step_nano(amount)
        assert step >= 0
        amount += step
        assert (held.funded_tokens(amount) > before) == (step > 0)
    assert amount == held.full_nano or held.funded_tokens(held.full_nano) == held.funded_tokens(
        amount
    )
    assert held.cap_nano is None or amount <= held.cap_nano
