"""Checks the protos: generated code is current, buf's lint passes, nothing breaks against main.

    python protos/check.py

Needs `make protos`' environment and buf on PATH (package buf-bin). The breaking check compares with the
branch main, or with origin/main in a clone that has no local main, and is skipped while neither holds protos.
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


def run(*command: str | Path, cwd: Path = REPOSITORY) -> None:
    """Runs a command; its failure is this check's."""
    environment = os.environ | {"PATH": f"{CODEGEN_PYTHON.parent}{os.pathsep}{os.environ['PATH']}"}
    if subprocess.run([str(part) for part in command], cwd=cwd, env=environment).returncode != 0:
        sys.exit(f"failed: {' '.join(str(part) for part in command)}")


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
    """main's protos, or None while main has none."""
    for branch in ("main", "origin/main"):
        listing = subprocess.run(
            ["git", "ls-tree", "-r", "--name-only", branch, "protos/"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        names = [n for n in listing.stdout.split() if n.endswith((".proto", "generate.py"))]
        if listing.returncode == 0 and any(n.endswith(".proto") for n in names):
            for name in names:
                target = scratch / "main" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                show = ["git", "show", f"{branch}:{name}"]
                target.write_bytes(subprocess.check_output(show, cwd=REPOSITORY))
            return scratch / "main" / "protos"
    return None


def main() -> None:
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
