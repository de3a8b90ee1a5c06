"""Configuration: frozen dataclasses <- one TOML section <- TIDEMILL_* environment variables.

The dataclass field is the only declaration of a setting. `TIDEMILL_ROUTER_QUEUE_SIZE=8` sets
field `queue_size` of section `router`; a field of a nested dataclass joins with an underscore
(`TIDEMILL_ROUTER_SERVER_ADDRESS`); the suffix `_FILE` reads the value from the file named, for
secrets. Whatever is not declared is an error that names the key and where it stood.
"""

import dataclasses
import enum
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tidemill.errors import ConfigError

T = TypeVar("T")

_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a value stood: for messages, and for resolving relative paths."""

    key: str
    source: str
    base: Path | None

    def inside(self, name: str) -> "_Place":
        return dataclasses.replace(self, key=f"{self.key}.{name}")

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self.source}: {self.key}: {problem}")


def load(cls: type[T], section: str, path: Path | None, environ: Mapping[str, str]) -> T:
    """Build `cls` from `[section]` of the TOML file `path`, overridden by `environ`.

    Relative `Path` values in the file are taken from the file's own directory. Tuples in the
    environment are comma-separated, dictionaries `key=value` pairs, comma-separated too.
    Raises ConfigError for an unknown key, a value of the wrong type, a required key that stands
    nowhere, a file that lacks the section, and any ValueError that `cls` itself raises.
    """
    source = "environment" if path is None else str(path)
    base = None if path is None else path.resolve().parent
    place = _Place(section, source, base)
    table: dict[str, Any] = {} if path is None else _read_section(path, section)
    overrides = _from_environ(cls, f"TIDEMILL_{section.upper()}_", environ)
    return typing.cast(T, _build(cls, _merge(table, overrides), place))


def _read_section(path: Path, section: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    if not isinstance(document.get(section), dict):
        raise ConfigError(f"{path}: has no section [{section}]")
    table: dict[str, Any] = document[section]
    return table


@dataclasses.dataclass(frozen=True)
class _FromEnviron:
    """The text of one variable, kept with its name until its field's type is known."""

    name: str
    text: str


def _from_environ(cls: type, prefix: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Nested tables of _FromEnviron, for every variable that starts with `prefix`."""
    names = _variable_names(cls, prefix)
    tables: dict[str, Any] = {}
    for variable in sorted(name for name in environ if name.startswith(prefix)):
        text = environ[variable]
        name = variable
        if name not in names and name.endswith("_FILE"):
            name = name.removesuffix("_FILE")
            if name in environ:
                raise ConfigError(f"environment: both {name} and {variable} are set")
            text = _read_secret(variable, text) if name in names else text
        if name not in names:
            raise ConfigError(f"environment: {variable}: unknown key")
        table = tables
        *parents, leaf = names[name]
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = _FromEnviron(variable, text)
    return tables


def _read_secret(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise ConfigError(f"environment: {variable}: {path}: {error.strerror}") from error


def _variable_names(cls: type, prefix: str) -> dict[str, tuple[str, ...]]:
    """Environment variable -> field path, for all fields of `cls` and of those nested in it."""
    names: dict[str, tuple[str, ...]] = {}
    for name, hint in _fields(cls).items():
        nested = _nested_dataclass(hint)
        if nested is None:
            names[prefix + name.upper()] = (name,)
        else:
            inner = _variable_names(nested, f"{prefix}{name.upper()}_")
            names.update({variable: (name, *rest) for variable, rest in inner.items()})
    return names


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _nested_dataclass(hint: Any) -> type | None:
    for option in (hint, *typing.get_args(hint)) if _is_union(hint) else (hint,):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _merge(table: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for key, value in overrides.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _build(cls: type, table: dict[str, Any], place: _Place) -> Any:
    hints = _fields(cls)
    unknown = sorted(set(table) - set(hints))
    if unknown:
        raise place.inside(unknown[0]).error(
            f"unknown key; known are {', '.join(sorted(hints)) or 'none'}"
        )
    for field in dataclasses.fields(cls):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if field.init and required and field.name not in table:
            raise place.inside(field.name).error("required, and set nowhere")
    values = {
        name: _convert(hints[name], value, place.inside(name)) for name, value in table.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise place.error(str(error)) from error


def _convert(hint: Any, value: Any, place: _Place) -> Any:
    if isinstance(value, _FromEnviron):
        place = _Place(value.name, "environment", None)
        return _convert_text(hint, value.text, place)
    if _is_union(hint):
        return _convert(_only_option(hint), value, place)
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, place)
    if origin is tuple and isinstance(value, list):
        item = typing.get_args(hint)[0]
        return tuple(
            _convert(item, each, dataclasses.replace(place, key=f"{place.key}[{index}]"))
            for index, each in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        item = typing.get_args(hint)[1]
        return {key: _convert(item, each, place.inside(key)) for key, each in value.items()}
    if hint is Path and isinstance(value, str):
        path = Path(value).expanduser()
        return path if place.base is None else place.base / path
    return _convert_scalar(hint, value, place)


def _convert_scalar(hint: Any, value: Any, place: _Place) -> Any:
    if typing.get_origin(hint) is typing.Literal:
        if value in typing.get_args(hint):
            return value
        allowed = ", ".join(map(str, typing.get_args(hint)))
        raise place.error(f"must be one of {allowed}, not {value!r}")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(value)
        except ValueError:
            allowed = ", ".join(str(member.value) for member in hint)
            raise place.error(f"must be one of {allowed}, not {value!r}") from None
    if hint is float and type(value) is int:
        return float(value)
    if hint in (str, int, float, bool) and type(value) is hint:
        return value
    raise place.error(f"must be {_describe(hint)}, not {value!r}")


def _convert_text(hint: Any, text: str, place: _Place) -> Any:
    if _is_union(hint):
        return _convert_text(_only_option(hint), text, place)
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_convert_text(item, part, place) for part in _split(text))
    if origin is dict:
        item = typing.get_args(hint)[1]
        pairs = [part.partition("=") for part in _split(text)]
        if not all(separator for _, separator, _ in pairs):
            raise place.error(f"must be key=value pairs, not {text!r}")
        return {key.strip(): _convert_text(item, each.strip(), place) for key, _, each in pairs}
    if hint is bool and text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise place.error(f"must be {_describe(hint)}, not {text!r}") from None
    return _convert(hint, text, place)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _only_option(hint: Any) -> Any:
    """The X of `X | None`, the only union that a setting may have."""
    options = [option for option in typing.get_args(hint) if option is not types.NoneType]
    assert len(options) == 1, f"a setting cannot be {hint}"
    return options[0]


def _describe(hint: Any) -> str:
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    if hint in names:
        return names[hint]
    if hint is Path:
        return "a path"
    origin = typing.get_origin(hint)
    if origin is tuple:
        return "a list"
    return "a table"
