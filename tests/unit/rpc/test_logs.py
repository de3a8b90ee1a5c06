import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tidemill.rpc import logs


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def written(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.usefixtures("root_logger")
def test_each_record_is_one_line_of_json_with_its_extra_fields() -> None:
    stream = io.StringIO()
    logs.configure("cache", stream=stream)
    logging.getLogger("tidemill.x").info("stored %d", 3, extra={"request_id": "r", "role": None})
    logging.getLogger("tidemill.x").debug("not shown")
    [line] = written(stream)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "service": "cache",
        "logger": "tidemill.x",
        "message": "stored 3",
        "request_id": "r",
    }


@pytest.mark.usefixtures("root_logger")
def test_a_traceback_stays_on_the_same_line() -> None:
    stream = io.StringIO()
    logs.configure("cache", stream=stream)
    try:
        raise KeyError("k")
    except KeyError:
        logging.getLogger("x").exception("broke")
    [line] = written(stream)
    assert "KeyError: 'k'" in line["traceback"]


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("name", ["authorization", "api_key", "password", "prompt", "text"])
def test_secrets_and_texts_are_redacted_by_name(name: str) -> None:
    stream = io.StringIO()
    logs.configure("router", stream=stream)
    logging.getLogger("x").info("call", extra={name: "hunter2"})
    assert "hunter2" not in stream.getvalue()
    assert written(stream)[0][name] == "[redacted]"
