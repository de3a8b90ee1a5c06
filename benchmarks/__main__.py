"""Run every benchmark, or those whose name contains an argument: `python -m benchmarks [NAME...]`.

A benchmark is a program `benchmarks/<area>/<name>.py`; each writes its own results file. The
first failure ends the run with its exit status.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def programs() -> list[str]:
    """Module names of all benchmarks."""
    files = sorted(HERE.glob("*/*.py"))
    runnable = [path for path in files if '__name__ == "__main__"' in path.read_text("utf-8")]
    return [f"benchmarks.{path.parent.name}.{path.stem}" for path in runnable]


def main(names: list[str]) -> int:
    chosen = [each for each in programs() if not names or any(name in each for name in names)]
    if not chosen:
        print(f"no benchmark is called {' or '.join(names)}; there are {', '.join(programs())}")
        return 2
    for program in chosen:
        print(f"== {program}", flush=True)
        status = subprocess.run([sys.executable, "-m", program], check=False, cwd=HERE.parent)
        if status.returncode != 0:
            return status.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
