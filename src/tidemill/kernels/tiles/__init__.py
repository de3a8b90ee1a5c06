"""Tiles as data: a file for each class of devices, with a table for each product of each dtype.

A table is a list of tiles in ascending order of `most_rows`, up to which a tile serves; the last
serves all above. `benchmarks.kernels.tune` times tiles and rewrites a file's lines.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tidemill.kernels.device import H100, DeviceClass

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FOLDER = Path(__file__).resolve().parent
MOST = 1 << 62  # rows: `most_rows` of a table's last tile
FormT = TypeVar("FormT", bound="DataclassInstance")

# Most rows -> tile, in ascending order; the last serves all above.
Classes = tuple[tuple[int, FormT], ...]


class TileFileError(ValueError):
    """A file of tiles says something that its kernels cannot take; names file, table and tile."""


def tables_of(
    name: str, form: type[FormT], folder: Path = FOLDER
) -> Mapping[DeviceClass, Classes[FormT]]:
    """The table `name` of every device class that has one; TileFileError."""
    found = {}
    for path in sorted(folder.glob("*.toml")):
        content = _content(path)
        if name in content:
            found[device_of(path)] = _classes(content[name], form, f"{path.name}: {name}")
    return found


def choose_tile(
    tables: Mapping[DeviceClass, Classes[FormT]], device: DeviceClass, num_rows: int
) -> FormT:
    """The tile for num_rows rows; a device that nobody timed takes an H100's."""
    classes = tables.get(device, tables[H100])
    return next((tile for most_rows, tile in classes if num_rows <= most_rows), classes[-1][1])


def all_tiles(tables: Mapping[DeviceClass, Classes[FormT]]) -> list[FormT]:
    """Each tile of any device class, once."""
    return list(dict.fromkeys(tile for classes in tables.values() for _, tile in classes))


def path_of(device: DeviceClass, folder: Path = FOLDER) -> Path:
    """Where the device class has its tiles: `9.0-132-3.toml` is an H100's."""
    major, minor = device.capability
    return folder / f"{major}.{minor}-{device.num_sms}-{device.bandwidth}.toml"


def device_of(path: Path) -> DeviceClass:
    """The device class that the file's name tells; TileFileError if it tells none."""
    try:
        capability, num_sms, bandwidth = path.stem.split("-")
        major, minor = capability.split(".")
        return DeviceClass((int(major), int(minor)), int(num_sms), int(bandwidth))
    except ValueError:
        raise TileFileError(
            f"{path.name}: named otherwise than CAPABILITY-MULTIPROCESSORS-TB/S.toml"
        ) from None


@cache
def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise TileFileError(f"{path.name}: {error}") from error


def _classes(rows: Any, form: type[FormT], where: str) -> Classes[FormT]:
    if not isinstance(rows, list) or not rows:
        raise TileFileError(f"{where}: needs a list of tiles")
    found: list[tuple[int, FormT]] = []
    for index, row in enumerate(rows):
        place = f"{where}: tile {index + 1}"
        given = dict(row) if isinstance(row, dict) else {}
        last = index == len(rows) - 1
        most_rows = given.pop("most_rows", None)
        if last != (most_rows is None):
            raise TileFileError(f"{place}: every tile but the last needs most_rows, the last none")
        most = MOST if last else _checked(most_rows, int, f"{place}: most_rows")
        if found and most <= found[-1][0]:
            raise TileFileError(f"{place}: most_rows must ascend")
        found.append((most, _tile(given, form, place)))
    return tuple(found)


def _tile(given: Mapping[str, Any], form: type[FormT], place: str) -> FormT:
    known = {field.name: field for field in fields(form)}
    if unknown := sorted(given.keys() - known.keys()):
        raise TileFileError(f"{place}: no field {', '.join(unknown)}")
    needed = [name for name, field in known.items() if field.default is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise TileFileError(f"{place}: lacks {', '.join(missing)}")
    values = {
        name: _checked(value, known[name].type, f"{place}: {name}") for name, value in given.items()
    }
    return form(**values)


def _checked(value: Any, kind: Any, place: str) -> Any:
    """As it is: an int from 0 on, a bool or a str, whatever the field is."""
    if type(value) is not kind or (kind is int and value < 0):
        raise TileFileError(f"{place}: {value!r} is no {kind.__name__} that a tile may have")
    return value


def fitting(
    tables: Mapping[DeviceClass, Classes[FormT]], version: str
) -> Mapping[DeviceClass, Classes[FormT]]:
    """Without the tiles that say, by `newest_triton`, that this Triton `version` is too new."""

    def fits(tile: FormT) -> bool:
        return fits_triton(getattr(tile, "newest_triton", ""), version)

    return {
        device: tuple(row for row in classes if fits(row[1])) for device, classes in tables.items()
    }


def fits_triton(newest: str, version: str) -> bool:
    """Whether a tile for Tritons up to `newest` ("3.6"; "" is every one) is for this `version`."""
    if not newest:
        return True
    ours, theirs = (tuple(map(int, each.split(".")[:2])) for each in (version, newest))
    return ours <= theirs
