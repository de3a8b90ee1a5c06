"""Checks the protos: generated code is current, buf's lint passes, nothing breaks against main.

    python protos/check.py

Needs the environment of `make protos` and buf (package buf-bin). The breaking check compares with
origin/main, or with main where there is no origin, and is skipped while neither holds protos.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REPOSITORY = ROOT.parent
CODEGEN_PYTHON = REPOSITORY / ".venv-protos" / "bin" / "python"
BUF = Path(sys.executable).with_name("buf")


def run(*command: str | Path) -> None:
    """Runs a command; its failure is this check's."""
    environment = os.environ | {"PATH": f"{CODEGEN_PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
    words = [str(part) for part in command]
    if subprocess.run(words, cwd=REPOSITORY, env=environment, check=False).returncode != 0:
        sys.exit(f"failed: {' '.join(words)}")


def git(*words: str) -> bytes:
    """What git prints; nothing where it fails, as it does for a branch that is not there."""
    command = ["git", *words]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).stdout


def check_current(scratch: Path) -> None:
    """Regenerates into a scratch folder and compares file by file."""
    fresh = scratch / "fresh"
    fresh.mkdir()
    run(CODEGEN_PYTHON, ROOT / "generate.py", "--out", fresh)
    made, kept = fresh / "tidemill" / "api", REPOSITORY / "src" / "tidemill" / "api"
    names = {str(p.relative_to(made)) for p in made.rglob("*.py*")}
    held = {str(p.relative_to(kept)) for p in kept.rglob("*.py*") if "__pycache__" not in p.parts}
    _, different, missing = filecmp.cmpfiles(made, kept, sorted(names), shallow=False)
    stale = sorted({*different, *missing, *(held - names)})
    if stale:
        sys.exit(f"src/tidemill/api is not what protos/ generates; run `make protos`: {stale}")


def reference_tree(scratch: Path) -> Path | None:
    """The published protos and their generator, or None while there are none."""
    for branch in ("origin/main", "main"):
        listing = git("ls-tree", "-r", "--name-only", branch, "protos/")
        names = [n for n in listing.decode().split() if n.endswith((".proto", "generate.py"))]
        if any(name.endswith(".proto") for name in names):
            for name in names:
                target = scratch / "main" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(git("show", f"{branch}:{name}"))
            return scratch / "main" / "protos"
    return None


def main() -> None:
    """Runs the three checks; exits non-zero at the first that fails."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        check_current(scratch)
        image, config = scratch / "now.binpb", ROOT / "buf.yaml"
        run(CODEGEN_PYTHON, ROOT / "generate.py", "--image", image)
        run(BUF, "lint", image, "--config", config)
        reference = reference_tree(scratch)
        if reference is None:
            print("protos: main has none yet, nothing to break")
            return
        before = scratch / "before.binpb"
        run(CODEGEN_PYTHON, reference / "generate.py", "--image", before)
        run(BUF, "breaking", image, "--against", before, "--config", config)
    print("protos: current, clean, compatible")


if __name__ == "__main__":
    main()
