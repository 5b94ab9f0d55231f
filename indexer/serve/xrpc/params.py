"""Query parameters, read once and checked against the protocol's syntax before use.

Every failure is a 400 `InvalidRequest` that names the parameter. Pure; any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from indexer.atproto.syntax import check_did
from indexer.atproto.types import Did
from indexer.errors import RequestError, SyntaxInvalid

Check = Callable[[str], str]


class _Query(Protocol):
    def getall(self, key: str, default: list[str], /) -> Sequence[str]: ...

    def __iter__(self) -> Iterator[str]: ...


class Params:
    """One request's query string. An empty value counts as absent."""

    def __init__(self, query: _Query) -> None:
        self._query = query

    def optional(self, name: str, check: Check | None = None) -> str | None:
        """The parameter, checked; None when it is absent."""
        values = [value for value in self._query.getall(name, []) if value]
        if len(values) > 1:
            raise RequestError(f"parameter {name} must not be repeated")
        return _checked(name, values[0], check) if values else None

    def required(self, name: str, check: Check | None = None) -> str:
        """The parameter, checked."""
        value = self.optional(name, check)
        if value is None:
            raise RequestError(f"parameter {name} is required")
        return value

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number within ``low``…``high``."""
        text = self.optional(name)
        if text is None:
            return default
        try:
            value = whole_number(name, text)
        except RequestError:
            value = -1
        if not low <= value <= high:
            raise RequestError(f"parameter {name} must be a whole number from {low} to {high}")
        return value

    def expect_only(self, known: Collection[str]) -> None:
        """Refuses parameters of other names: one that is misspelt would count as absent."""
        if unknown := sorted(set(self._query) - set(known)):
            raise RequestError(f"unknown parameter {unknown[0][:80]}; there are {', '.join(known)}")

    def expect_values(self, name: str) -> None:
        """Refuses an empty value of a parameter, where it must not count as absent."""
        if not all(self._query.getall(name, [])):
            raise RequestError(f"parameter {name} is empty")

    def optional_integer(self, name: str) -> int | None:
        """A whole number that is not negative, None when it is absent."""
        text = self.optional(name)
        return None if text is None else whole_number(name, text)

    def flag(self, name: str) -> bool:
        """A boolean; absent is false."""
        text = self.optional(name)
        if text not in (None, "true", "false"):
            raise RequestError(f"parameter {name} must be true or false")
        return text == "true"

    def many(self, name: str, check: Check, most: int) -> list[str]:
        """A repeated parameter or comma list, each item checked."""
        items = [item for value in self._query.getall(name, []) for item in value.split(",") if item]
        if len(items) > most:
            raise RequestError(f"parameter {name} takes at most {most} values")
        return [_checked(name, item, check) for item in items]


def checked_did(text: str) -> Did:
    """A DID in a path or a body; `RequestError` says what is wrong with it."""
    try:
        return check_did(text)
    except SyntaxInvalid as error:
        raise RequestError(f"did: {error}") from error


def whole_number(name: str, text: str) -> int:
    """``text`` as an integer from 0 to 2^63 - 1, in plain decimal digits."""
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and int(text) < 1 << 63):
        raise RequestError(f"parameter {name} must be a whole number that is not negative")
    return int(text)


def _checked(name: str, value: str, check: Check | None) -> str:
    if check is None:
        return value
    try:
        return check(value)
    except SyntaxInvalid as error:
        raise RequestError(f"parameter {name}: {error}") from error
