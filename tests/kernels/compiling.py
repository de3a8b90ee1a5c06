"""Pythons that compile kernels: processes of their own, since importing Triton decides for good
whether it interprets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(sys.executable)
ON_GPUS = ROOT / ".venv-triton36/bin/python"


def output_of(python: Path, *arguments: str | Path, **environment: str) -> str:
    """What it writes, without the interpreter; the test is skipped where there is no such Python.

    Fails the test with the end of what it complained of.
    """
    if not python.exists():
        pytest.skip(f"no {python.relative_to(ROOT)}: `make test` makes it")
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
