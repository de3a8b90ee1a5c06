import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SERVICE = """
import asyncio, sys
from tidemill.errors import ConfigError
from tidemill.rpc.process import run

async def main(stop):
    print("up", type(asyncio.get_running_loop()).__module__, flush=True)
    {body}

sys.exit(run("test", main))
"""

Start = Callable[[str], subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """body of main -> the process, after it has printed its first line."""
    processes: list[subprocess.Popen[str]] = []

    def launch(body: str) -> subprocess.Popen[str]:
        script = tmp_path / "service.py"
        script.write_text(SERVICE.format(body=body))
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, script], stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("up uvloop")
        return process

    yield launch
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_service_drain(start: Start, number: signal.Signals) -> None:
    process = start("await stop.wait(); print('drained')")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "drained\n")
    assert json.loads(err.splitlines()[0])["signal"] == number.name


def test_a_second_signal_ends_at_once(start: Start) -> None:
    process = start("await stop.wait(); print('draining', flush=True); await asyncio.sleep(60)")
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.readline() == "draining\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 130


IN_A_TASK_GROUP = """
    async def fail():
        raise ConfigError('x.toml: router.port: unknown key')
    async with asyncio.TaskGroup() as group:
        group.create_task(fail())
"""


@pytest.mark.parametrize(
    "body", ["raise ConfigError('x.toml: router.port: unknown key')", IN_A_TASK_GROUP.lstrip()]
)
def test_a_bad_configuration_is_one_line_and_status_2(start: Start, body: str) -> None:
    process = start(body)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err == "tidemill test: x.toml: router.port: unknown key\n"


def test_a_crash_is_in_the_log_with_status_1(start: Start) -> None:
    process = start("1 / 0")
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "ZeroDivisionError" in json.loads(err)["traceback"]
