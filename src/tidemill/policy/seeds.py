"""SplitMix64 (Steele, Lea, Flood 2014), by which seeds, choices and positions become keys."""

MASK64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX_A = 0xBF58476D1CE4E5B9
MIX_B = 0x94D049BB133111EB

# Keeps the keys of choices apart from those of positions, which are mixed in the same way.
_CHOICES = 0x43484F4943455321


def mix64(value: int) -> int:
    """One step of the counter by the golden gamma, then a mix of its bits; 64 bits to 64 bits."""
    value = (value + GOLDEN) & MASK64
    value = ((value ^ (value >> 30)) * MIX_A) & MASK64
    value = ((value ^ (value >> 27)) * MIX_B) & MASK64
    return value ^ (value >> 31)


def choice_seed(seed: int, choice: int) -> int:
    """Seed of the choice'th of a request's completions, from 0; the first draws with the request's.

    Pinned: a failover may resume a choice on a worker of another version.
    """
    return seed if choice == 0 else mix64(mix64(seed ^ _CHOICES) ^ choice)
