"""Gumbel noise as a pure function of (seed, absolute position, token id)."""

from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014). tidemill.policy.seeds mixes seeds the same way; neither may
# import the other, and all values are pinned by tests.
MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_A = 0xBF58476D1CE4E5B9
MIX_B = 0x94D049BB133111EB


def gumbel_noise(seed: int, position: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64 for each of token_ids [N] at one position of one sequence."""
    key = _signed(_mix64(_mix64(seed) ^ position))
    bits = _mix_in_place((token_ids + 1).mul_(_signed(GOLDEN)).add_(key))
    uniform = _shift_right(bits, 12).double().add_(0.5).mul_(2.0**-52)  # exact, never 0 or 1
    return uniform.log_().neg_().log_().neg_()


def _mix64(value: int) -> int:
    """One step of the counter by the golden gamma, then a mix of its bits; 64 bits to 64 bits."""
    value = (value + GOLDEN) & MASK64
    value = ((value ^ (value >> 30)) * MIX_A) & MASK64
    value = ((value ^ (value >> 27)) * MIX_B) & MASK64
    return value ^ (value >> 31)


def _mix_in_place(value: Tensor) -> Tensor:
    """As `_mix64` without its step, on int64, whose products wrap as unsigned ones do."""
    value.bitwise_xor_(_shift_right(value, 30)).mul_(_signed(MIX_A))
    value.bitwise_xor_(_shift_right(value, 27)).mul_(_signed(MIX_B))
    return value.bitwise_xor_(_shift_right(value, 31))


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's int64 shift copies the sign."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
