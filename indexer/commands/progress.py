"""What commands tell of long work and of numbers: a bar on standard error when a terminal is attached."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

#: Called with what is being done, how much of it is, and how much there is in all.
Tell: TypeAlias = Callable[[str, int, int], None]


@contextmanager
def bar(title: str) -> Iterator[Tell]:
    """The function that moves the bar; it may be called from another thread."""
    if not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=max(done, total, 1))

        yield tell


def counted(number: int, what: str, plural: str | None = None) -> str:
    """``1 record``, ``2 records``, ``2 repositories``."""
    return f"{number} {what}" if number == 1 else f"{number} {plural or f'{what}s'}"
