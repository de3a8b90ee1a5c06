import signal
import subprocess
import sys
from pathlib import Path

import pytest

from services.router import crash_points

ROUTER = Path(crash_points.__file__).parent


def run(code: str, crash_at: str) -> int:
    script = f"from services.router.crash_points import crash_point\n{code}"
    environment = {crash_points.VARIABLE: crash_at}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROUTER.parents[1], check=False
    )
    return done.returncode


def test_a_process_dies_at_the_passage_that_the_environment_names() -> None:
    twice = "crash_point('settle.before')\nprint()\ncrash_point('settle.before')"
    assert run(twice, "settle.before") == -signal.SIGKILL
    assert run(twice, "settle.before:2") == -signal.SIGKILL
    assert run(twice, "settle.before:3") == 0
    assert run(twice, "settle.after") == 0


def test_a_process_that_is_watching_a_file_dies_at_what_it_comes_to_say(tmp_path: Path) -> None:
    file = tmp_path / "crash"
    then = f"crash_point('settle.after')\nopen({str(file)!r}, 'w').write('settle.after:2')\n"
    assert run("crash_point('settle.after')", f"@{file}") == 0
    assert run(then + "crash_point('settle.after')", f"@{file}") == 0
    file.unlink()
    assert run(then + "crash_point('settle.after')\n" * 2, f"@{file}") == -signal.SIGKILL


def test_an_unknown_point_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        crash_points.crash_point("nowhere")
