"""`tidemill prices`: books in the units that people know, checked before they are used."""

from pathlib import Path

import pytest

from tidemill.client.cli import main

PRICES = Path(__file__).parents[3] / "prices"
HISTORY = str(PRICES / "deepseek.toml")
FEBRUARY = str(PRICES / "deepseek-2025-02.toml")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_show_prints_each_tariff_in_units_per_million_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prices", "show", HISTORY]) == 0
    shown = lines(capsys)
    assert "calendar cn: 33 holidays of 2026" in shown
    start = shown.index("deepseek-reasoner, per million tokens")
    assert shown[start + 5 : start + 12] == [
        "from 2025-02-26T00:00:00+08:00, Asia/Shanghai, completion decides",
        "off-peak: 00:30-08:30",
        "CNY  hit    0.25  miss       1  output       4",
        "USD  hit   0.035  miss   0.135  output    0.55",
        "standard: 00:00-00:30, 08:30-24:00",
        "CNY  hit       1  miss       4  output      16",
        "USD  hit    0.14  miss    0.55  output    2.19",
    ]
    off_peak = "off-peak: mon-fri 00:00-09:00, 12:00-14:00, 18:00-24:00; sat-sun, holiday all day"
    assert off_peak in shown
    assert "peak: mon-fri 09:00-12:00, 14:00-18:00" in shown


def test_check_names_what_is_wrong_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.toml"
    text = Path(FEBRUARY).read_text(encoding="utf-8")
    broken.write_text(text.replace("end = 00:30:00", "end = 00:00:00", 1), encoding="utf-8")
    assert main(["prices", "check", str(broken), FEBRUARY]) == 1
    out, err = capsys.readouterr()
    assert err == (
        f"error: {broken}: models.deepseek-chat.tariffs[0].windows leave mon without a price "
        "from 00:00:00 to 00:30:00\n"
    )
    assert out.startswith(f"{FEBRUARY}: deepseek-2025-02, version 1, digest ")


def test_check_compares_holidays_and_says_where_they_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prices", "check", HISTORY]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("calendar cn ends with 2026: no price is known after it\n")
    assert not err
    changed = tmp_path / "changed.toml"
    text = Path(HISTORY).read_text(encoding="utf-8")
    changed.write_text(text.replace("2026-10-07", "2026-10-08"), encoding="utf-8")
    assert main(["prices", "check", str(changed)]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {changed}: calendar cn: 2026-10-07 is not listed, and "
        "'Day off (substituted from 10/10/2026)' by the package holidays",
        f"warning: {changed}: calendar cn: 2026-10-08 is listed, and a working day by the package "
        "holidays",
    ]


@pytest.mark.parametrize(
    ("time", "model", "expected"),
    [
        ("2025-03-01T00:29:59.999+08:00", "deepseek-chat",
         ["deepseek-chat: standard, until 2025-03-01T00:30:00+08:00, then off-peak",
          "USD  hit    0.07  miss    0.27  output     1.1"]),
        ("2025-02-28T16:30Z", "deepseek-chat",
         ["deepseek-chat: off-peak, until 2025-03-01T08:30:00+08:00, then standard",
          "USD  hit   0.035  miss   0.135  output    0.55"]),
        ("2026-09-30T18:00+08:00", "deepseek-flash",
         ["deepseek-flash: off-peak, until 2026-10-08T09:00:00+08:00, then peak",
          "USD  hit   0.003  miss    0.15  output     0.6"]),
        ("2026-12-31T18:00+08:00", "deepseek-v4-pro",
         ["deepseek-v4-pro: off-peak, until 2027-01-01T00:00:00+08:00, where the calendar ends",
          "USD  hit   0.022  miss    0.66  output    1.98"]),
        ("2026-01-01T00:00Z", "deepseek-chat",
         ["deepseek-chat: standard, no end in sight",
          "USD  hit   0.028  miss    0.28  output    0.42"]),
    ],
)  # fmt: skip
def test_at_tells_the_window_its_prices_and_its_end(
    time: str, model: str, expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prices", "at", time, HISTORY, "--model", model, "--currency", "USD"]) == 0
    assert lines(capsys) == expected


def test_at_goes_through_all_models_and_says_which_are_not_sold_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prices", "at", "2024-12-01T00:00Z", HISTORY]) == 0
    shown = lines(capsys)
    assert shown[:3] == [
        "deepseek-chat: standard, until 2025-02-09T00:00:00+08:00, then standard",
        "CNY  hit     0.1  miss       1  output       2",
        "USD  hit   0.014  miss    0.14  output    0.28",
    ]
    assert "deepseek-flash: not sold yet" in shown


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["at", "2025-03-01T00:00", HISTORY], "TIME needs an offset from UTC"),
        (["at", "noon", HISTORY], "TIME is no ISO 8601 time: 'noon'"),
        (["at", "2025-03-01T00:00Z", HISTORY, "--model", "gpt"], "has no model 'gpt'"),
        (
            ["at", "2025-03-01T00:00Z", HISTORY, "--model", "deepseek-flash"],
            "has no tariff for 'deepseek-flash' at 2025-03-01 00:00:00+00:00",
        ),
        (["show", "absent.toml"], "absent.toml cannot be read"),
    ],
)
def test_what_cannot_be_answered_is_an_error(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prices", *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_at_names_each_model_without_a_price_and_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prices", "at", "2027-01-04T00:00Z", HISTORY]) == 1
    out, err = capsys.readouterr()
    complaint = "calendar 'cn' does not cover 2027, asked for 2027-01-04"
    assert f"error: deepseek-flash: {complaint}\n" in err
    assert "deepseek-flash" not in out
    assert "deepseek-chat: standard, no end in sight\n" in out
    assert main(["prices", "at", "2025-03-01T00:00Z", FEBRUARY, "--currency", "EUR"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert [line.rpartition(": ")[2] for line in err.splitlines()] == [
        "window 'off-peak' has no prices in 'EUR'",
        "window 'off-peak' has no prices in 'EUR'",
    ]
