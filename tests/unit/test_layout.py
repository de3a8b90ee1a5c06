import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("src", "services", "tests", "protos", "benchmarks", "loadtest", "training", "simulator")
GENERATED = ROOT / "src/tidemill/api"

FILE_LINES = 600
FUNCTION_LINES = 90
KERNEL_LINES = 200

VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def python_files() -> list[Path]:
    found = [path for tree in TREES for path in (ROOT / tree).rglob("*.py")]
    return sorted(path for path in found if not path.is_relative_to(GENERATED))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_file_is_longer_than_one_sitting() -> None:
    lengths = {
        name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    too_long = {}
    for path in python_files():
        for function in functions(path):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > (KERNEL_LINES if is_kernel(function) else FUNCTION_LINES):
                too_long[f"{name_of(path)}::{function.name}"] = lines
    assert too_long == {}


def test_every_file_is_named_for_its_subject() -> None:
    assert [name_of(path) for path in python_files() if path.stem in VAGUE_NAMES] == []


@pytest.mark.parametrize("tree", ["src/tidemill", "services"])
def test_every_folder_with_code_is_a_package(tree: str) -> None:
    folders = {path.parent for path in (ROOT / tree).rglob("*.py")}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_part_of_the_library_has_an_import_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    covered = {source for contract in contracts for source in contract.get("source_modules", ())}
    parts = {
        f"tidemill.{path.stem}"
        for path in (ROOT / "src/tidemill").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert sorted(parts - covered - {"tidemill.__init__"}) == []
