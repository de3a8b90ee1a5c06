from pathlib import Path

import pytest

from tidemill.worker.load_progress import LoadProgress


def lines_at(caplog: pytest.LogCaptureFixture, seconds_per_percent: float) -> list[str]:
    now = 0.0
    progress = LoadProgress(Path("model"), clock=lambda: now)
    with caplog.at_level("INFO", "tidemill.worker.load_progress"):
        for percent in range(1, 101):
            now += seconds_per_percent
            progress(percent * 1_000_000, 100_000_000)
    return [record.getMessage() for record in caplog.records]


def test_long_load_logs_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    lines = lines_at(caplog, 2.0)
    assert len(lines) == 10
    assert lines[0] == "loading model: 10 of 100 MB in 20 s"
    assert lines[-1] == "loading model: 100 of 100 MB in 200 s"


def test_fast_load_logs_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    assert len(lines_at(caplog, 0.03)) == 3


def test_instant_load_logs_its_end(caplog: pytest.LogCaptureFixture) -> None:
    assert lines_at(caplog, 0.0) == ["loading model: 100 of 100 MB in 0 s"]
