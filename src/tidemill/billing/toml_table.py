"""A TOML table that is read strictly: what is not understood is refused, never skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from tidemill.errors import ConfigError

_Value = TypeVar("_Value")
_Choice = TypeVar("_Choice", bound=StrEnum)


class Table:
    """A table that knows its file and path, and which of its keys were asked for."""

    def __init__(self, content: object, source: str, path: str = "") -> None:
        self._source = source
        self._path = path
        if not isinstance(content, dict):
            self.refuse("must be a table")
        self._content: dict[str, Any] = content
        self._unread = set(content)

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def refuse(self, problem: str, key: str = "") -> NoReturn:
        """Raise ConfigError for this table or one of its keys."""
        raise ConfigError(f"{self._source}: {self.at(key) or 'the document'} {problem}")

    def at(self, key: str) -> str:
        """The path of a key from the top of the document."""
        return f"{self._path}.{key}".strip(".")

    def take(self, key: str, kind: type[_Value]) -> _Value:
        """The value of a required key, which must be exactly of type `kind`."""
        self._unread.discard(key)
        if key not in self._content:
            self.refuse("is missing", key)
        value = self._content[key]
        if type(value) is not kind:
            self.refuse(f"must be of type {kind.__name__}, got {type(value).__name__}", key)
        return value

    def text(self, key: str) -> str:
        """A string with something in it."""
        value = self.take(key, str)
        if not value.strip():
            self.refuse("is empty", key)
        return value

    def choice(self, key: str, kind: type[_Choice]) -> _Choice:
        """One of an enumeration's values."""
        return self._member(key, self.take(key, str), kind)

    def choices(self, key: str, kind: type[_Choice]) -> frozenset[_Choice]:
        """At least one of an enumeration's values, each once."""
        return frozenset(self._member(key, name, kind) for name in self.distinct(key, str))

    def distinct(self, key: str, kind: type[_Value]) -> list[_Value]:
        """A list of at least one value of exactly type `kind`, each once."""
        values = self.take(key, list)
        for index, value in enumerate(values):
            if type(value) is not kind:
                self.refuse(
                    f"must be of type {kind.__name__}, got {type(value).__name__}",
                    f"{key}[{index}]",
                )
            if value in values[:index]:
                self.refuse(f"has {value!s} twice", key)
        if not values:
            self.refuse("is empty", key)
        return values

    def table(self, key: str) -> Table:
        """A table below this one."""
        return Table(self.take(key, dict), self._source, self.at(key))

    def tables(self, key: str) -> list[Table]:
        """A list of at least one table below this one."""
        items = self.take(key, list)
        if not items:
            self.refuse("is empty", key)
        return [
            Table(item, self._source, f"{self.at(key)}[{index}]")
            for index, item in enumerate(items)
        ]

    def each(self, read: Callable[[str, Table], _Value]) -> Mapping[str, _Value]:
        """Every key of this table, whatever its name, as a table read by `read(key, table)`."""
        if not self._content:
            self.refuse("is empty")
        return MappingProxyType({key: read(key, self.table(key)) for key in self._content})

    def done(self) -> None:
        """Refuse the keys that nobody asked for."""
        for key in sorted(self._unread):
            self.refuse("is not a known key", key)

    def _member(self, key: str, name: str, kind: type[_Choice]) -> _Choice:
        try:
            return kind(name)
        except ValueError:
            allowed = ", ".join(repr(member.value) for member in kind)
            self.refuse(f"must be one of {allowed}, got {name!r}", key)
