"""Integer arithmetic for money: nothing in this package may meet a float (M1)."""

PICO_PER_NANO = 1_000


def require_int(value: object, name: str) -> int:
    """Return `value` if it is an int and no bool; TypeError names `name` otherwise."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return value


def round_half_up(pico: int) -> int:
    """Pico-units to whole nano-units; exactly half a nano-unit rounds up."""
    return (require_int(pico, "pico") + PICO_PER_NANO // 2) // PICO_PER_NANO


def format_amount(amount_nano: int, currency: str) -> str:
    """An amount for people: all nine decimals and the currency, `0.001234500 USD`."""
    sign = "-" if require_int(amount_nano, "amount_nano") < 0 else ""
    units, nanos = divmod(abs(amount_nano), 1_000_000_000)
    return f"{sign}{units}.{nanos:09d} {currency}"


def format_per_million(pico: int) -> str:
    """A price of pico-units per token as units per million tokens, exactly: 135_000 is `0.135`."""
    units, rest = divmod(require_int(pico, "pico"), 1_000_000)
    return f"{units}.{rest:06d}".rstrip("0").removesuffix(".")
