"""`python -m services`: the whole stack as its own processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.redis]

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Iterator[Launch]:
    """(*arguments) -> the running launcher; its state in tmp_path/up or tmp_path/demo."""
    started = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "services", *arguments]
        command += ["--model", str(model), "--state", str(tmp_path)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def pids(state: Path) -> dict[str, int]:
    lines = (state / "pids").read_text().splitlines()
    return {name: int(pid) for pid, name in (line.split() for line in lines)}


def troubles(state: Path) -> str:
    """What the services logged at WARNING or above: the reason, when an assertion fails."""
    lines = [line for log in state.glob("logs/*.log") for line in log.read_text().splitlines()]
    return "\n".join(line for line in lines if '"level": "WARNING"' in line or '"ERROR"' in line)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until_up(process: "subprocess.Popen[str]") -> list[str]:
    """The launcher's lines up to the last one that it prints when all is up."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if "Ctrl-C" in line:
            return lines
    _, errors = process.communicate(timeout=60)
    raise AssertionError("\n".join(["the stack did not come up:", *lines, errors]))


@pytest.mark.parametrize("role", ["split", "both"])
def test_the_demo_bills_the_second_answer_for_less(
    launch: Launch, tmp_path: Path, role: str
) -> None:
    process = launch("demo", "--role", role)
    output, errors = process.communicate(timeout=START_TIMEOUT_S)
    assert (process.returncode, errors) == (0, ""), troubles(tmp_path / "demo")
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    rows = {name: figures for name, *figures in cells if len(figures) == 2}
    prompt_tokens, again = map(int, rows["prompt tokens"])
    assert prompt_tokens == again > 1000
    assert int(rows["computed"][0]) == prompt_tokens
    assert int(rows["billed as hits"][1]) == (prompt_tokens - 1) // 64 * 64
    assert int(rows["reused: device"][1]) == prompt_tokens - int(rows["computed"][1])
    assert "stopped after" in output.splitlines()[-1]
    assert not (tmp_path / "demo" / "pids").exists()


def test_up_says_how_to_call_it_and_stops_everything_at_ctrl_c(
    launch: Launch, tmp_path: Path
) -> None:
    process = launch("up")
    lines = until_up(process)
    exports = [line.strip() for line in lines if line.strip().startswith("export ")]
    environ = dict(line.removeprefix("export ").split("=", 1) for line in exports)
    assert set(environ) == {
        "TIDEMILL_ADDRESS",
        "TIDEMILL_ADMIN_KEY",
        "TIDEMILL_API_KEY",
        "TIDEMILL_CA",
    }
    env_file = (tmp_path / "up" / "env").read_text(encoding="utf-8")
    assert re.findall(r"http://127\.0\.0\.1:\d+/metrics", env_file.partition("LOAD_METRICS")[2])
    (command,) = [line.strip() for line in lines if " generate " in line]
    call = subprocess.run(
        ["/bin/sh", "-c", f"{command} --max-tokens 4 --json"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert call.returncode == 0, call.stderr + troubles(tmp_path / "up")
    assert '"usage"' in call.stdout

    running = pids(tmp_path / "up")
    assert list(running) == ["redis-cache", "redis-ledger", "cache", "prefill", "decode", "router"]
    second = launch("up")
    _, errors = second.communicate(timeout=30)
    assert second.returncode == 2
    assert f"{running['router']} router" in errors

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert not any(map(is_alive, running.values()))


def test_a_crash_is_reported_with_its_log_and_takes_the_stack_down(
    launch: Launch, tmp_path: Path
) -> None:
    process = launch("up", "--role", "both")
    until_up(process)
    running = pids(tmp_path / "up")
    begun = time.monotonic()
    os.kill(running["cache"], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "cache ended by signal 9" in errors
    assert "the end of" in errors
    assert time.monotonic() - begun < 40
    assert not any(map(is_alive, running.values()))


def test_a_folder_without_a_model_is_refused_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services", "demo", "--model", str(tmp_path)]
    run = subprocess.run(
        [*command, "--state", str(tmp_path / "state")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 2
    assert "config.json" in run.stderr
    assert "starting" not in run.stdout
