import datetime as dt
from pathlib import Path

import pytest

from services.router.config import ModelConfig
from services.router.models import load_model
from tidemill.billing import load_price_book
from tidemill.errors import ConfigError

ROOT = Path(__file__).parents[3]
BOOK = load_price_book(ROOT / "prices" / "deepseek.toml")


@pytest.mark.parametrize(
    ("price_model", "day", "problem"),
    [
        ("deepseek-flash", "2026-09-01", "has no tariff for 'deepseek-flash'"),
        ("deepseek-flash", "2027-01-04", "calendar 'cn' does not cover 2027"),
        ("deepseek-talk", "2026-10-01", "has no model 'deepseek-talk'"),
    ],
)
def test_a_model_without_a_price_today_is_refused_at_start(
    price_model: str, day: str, problem: str
) -> None:
    now_ms = int(dt.datetime.fromisoformat(f"{day}T00:00:00Z").timestamp() * 1000)
    config = ModelConfig(name="m", path=ROOT / "models" / "demo", price_model=price_model)
    with pytest.raises(ConfigError, match=problem):
        load_model(config, BOOK, now_ms)
