"""Files of tiles: what is in them, who reads them, and what is refused."""

import ast
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidemill.kernels.device import H100, DeviceClass
from tidemill.kernels.fp8_gemm.configs import Tile as GemmTile
from tidemill.kernels.tiles import (
    FOLDER,
    MOST,
    TileFileError,
    choose_tile,
    device_of,
    fitting,
    path_of,
    tables_of,
)

KERNELS = FOLDER.parent
FILES = sorted(FOLDER.glob("*.toml"))
H200 = DeviceClass((9, 0), 132, 4)


@dataclass(frozen=True)
class Form:
    rows: int
    swap: bool = False


def names_read() -> set[str]:
    """Every name that some op's configs.py asks for, by its own text and by what it holds."""
    told: set[str] = set()
    for path in KERNELS.glob("*/configs.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tables_of":
                name = node.args[0]
                if isinstance(name, ast.Constant):
                    told.add(str(name.value))
                else:
                    stem = ast.unparse(name)[2:-1].partition("{")[0]
                    told |= {f"{stem}{dtype}" for dtype in ("fp8", "bf16", "fp32")}
    return told


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_table_of_a_file_is_read_by_an_op(path: Path) -> None:
    assert set(tomllib.loads(path.read_text("utf-8"))) <= names_read()


def test_an_h100_has_every_table() -> None:
    assert set(tomllib.loads(path_of(H100).read_text("utf-8"))) == names_read()


def write(folder: Path, text: str, device: DeviceClass = H100) -> Path:
    path = path_of(device, folder)
    path.write_text(text)
    return path


def test_tile_serves_up_to_its_rows_and_the_last_all_above(tmp_path: Path) -> None:
    write(tmp_path, "op = [\n{ most_rows = 16, rows = 8 },\n{ rows = 64, swap = true },\n]")
    tables = tables_of("op", Form, tmp_path)
    assert tables == {H100: ((16, Form(8)), (MOST, Form(64, swap=True)))}
    chosen = [choose_tile(tables, H100, rows).rows for rows in (1, 16, 17, 1 << 40)]
    assert chosen == [8, 8, 64, 64]


def test_device_takes_its_own_table_and_an_h100s_where_it_has_none(tmp_path: Path) -> None:
    write(tmp_path, "op = [{ rows = 1 }]\nother = [{ rows = 2 }]")
    write(tmp_path, "op = [{ rows = 3 }]", H200)
    assert choose_tile(tables_of("op", Form, tmp_path), H200, 1) == Form(3)
    assert choose_tile(tables_of("other", Form, tmp_path), H200, 1) == Form(2)
    assert choose_tile(tables_of("op", Form, tmp_path), DeviceClass((10, 0), 148, 8), 1) == Form(1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("op = [{ rows = 1, swop = true }]", "op: tile 1: no field swop"),
        ("op = [{ swap = true }]", "op: tile 1: lacks rows"),
        ("op = [{ rows = true }]", "op: tile 1: rows: True is no int"),
        ("op = [{ rows = -1 }]", "op: tile 1: rows: -1 is no int"),
        ("op = [{ rows = 1, swap = 1 }]", "op: tile 1: swap: 1 is no bool"),
        ("op = [{ rows = 1 }, { rows = 2 }]", "op: tile 1: every tile but the last needs"),
        ("op = [{ most_rows = 1, rows = 1 }]", "op: tile 1: every tile but the last needs"),
        (
            "op = [{ most_rows = 8, rows = 1 }, { most_rows = 8, rows = 1 }, { rows = 2 }]",
            "op: tile 2: most_rows must ascend",
        ),
        ("op = []", "op: needs a list of tiles"),
        ("op = 3", "op: needs a list of tiles"),
        ("op = [3]", "op: tile 1: lacks rows"),
        ("op = [", "Invalid value"),
    ],
)
def test_file_that_no_kernel_could_take_is_refused_by_name(
    tmp_path: Path, text: str, told: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(TileFileError, match=f"^{path.name}: {told}"):
        tables_of("op", Form, tmp_path)


@pytest.mark.parametrize("device", [H100, H200, DeviceClass((12, 1), 8, 11)], ids=str)
def test_file_is_named_for_its_device_class(device: DeviceClass) -> None:
    assert device_of(path_of(device)) == device


@pytest.mark.parametrize("name", ["h100", "9-132-3", "9.0-132", "9.0-132-x"])
def test_file_named_for_no_device_class_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.toml").write_text("op = [{ rows = 1 }]")
    with pytest.raises(TileFileError, match=f"^{name}.toml: named otherwise"):
        tables_of("op", Form, tmp_path)


def test_a_tile_that_a_newer_triton_would_spill_is_left_out_there(tmp_path: Path) -> None:
    path_of(H100, tmp_path).write_text(
        "gemm = [{ most_rows = 16, rows = 16, columns = 64, depth = 128 },"
        ' { rows = 128, columns = 128, depth = 128, newest_triton = "3.6" }]'
    )
    tables = tables_of("gemm", GemmTile, tmp_path)
    for version, largest in (("3.6.1", 128), ("3.5.0", 128), ("3.9.0", 16), ("3.10.0", 16)):
        assert choose_tile(fitting(tables, version), H100, 4096).rows == largest
