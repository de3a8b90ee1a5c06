"""Usage, price books, charges and receipts: pure, and integers only (M1)."""

from tidemill.billing.chain import Chained, next_chain
from tidemill.billing.charge import Charge, clamp_decided_at, compute_charge
from tidemill.billing.integers import format_amount
from tidemill.billing.margin import BusyPart
from tidemill.billing.price_file import load_price_book, parse_price_book
from tidemill.billing.prices import Decides, PriceBook, Prices, Rounding, Tariff, Window
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
    "Chained",
    "Charge",
    "Cheaper",
    "Decides",
    "PriceBook",
    "Prices",
    "Receipt",
    "Reuse",
    "Rounding",
    "Tariff",
    "Tokens",
    "Unbilled",
    "Usage",
    "Window",
    "cheaper_window",
    "clamp_decided_at",
    "compute_charge",
    "dearest",
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
