"""Usage, price books, charges and receipts: pure, and integers only (M1)."""

from tidemill.billing.calendars import Calendar, Day
from tidemill.billing.chain import Chained, next_chain
from tidemill.billing.charge import Charge, clamp_decided_at, compute_charge
from tidemill.billing.integers import format_amount
from tidemill.billing.margin import BusyPart
from tidemill.billing.price_file import load_price_book, parse_price_book
from tidemill.billing.price_json import decode_book
from tidemill.billing.prices import (
    Decides,
    PriceBook,
    Prices,
    Rounding,
    Tariff,
    Turn,
    Window,
)
from tidemill.billing.quote import (
    Cheaper,
    Tokens,
    cheaper_window,
    dearest,
    expected_nano,
    hold_nano,
    payable_output_tokens,
    reachable_windows,
    worst_case_nano,
)
from tidemill.billing.receipt import Receipt, issue_receipt, verify
from tidemill.billing.usage import Reuse, Unbilled, Usage

__all__ = [
    "BusyPart",
    "Calendar",
    "Chained",
    "Charge",
    "Cheaper",
    "Day",
    "Decides",
    "PriceBook",
    "Prices",
    "Receipt",
    "Reuse",
    "Rounding",
    "Tariff",
    "Tokens",
    "Turn",
    "Unbilled",
    "Usage",
    "Window",
    "cheaper_window",
    "clamp_decided_at",
    "compute_charge",
    "dearest",
    "decode_book",
    "expected_nano",
    "format_amount",
    "hold_nano",
    "issue_receipt",
    "load_price_book",
    "next_chain",
    "parse_price_book",
    "payable_output_tokens",
    "reachable_windows",
    "verify",
    "worst_case_nano",
]
