"""Files and folders that a command line names: one error for one that is not there or not what is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import click

from indexer.errors import RequestError


class NamedPath(click.Path):
    """A `click.Path` that is wrong like any other input, exit code 1, and not like a wrong option."""

    def __init__(
        self,
        *,
        exists: bool = False,
        file_okay: bool = True,
        dir_okay: bool = True,
        allow_dash: bool = False,
    ) -> None:
        super().__init__(
            exists=exists, file_okay=file_okay, dir_okay=dir_okay, allow_dash=allow_dash, path_type=Path
        )

    def fail(
        self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None
    ) -> NoReturn:
        name = "" if param is None else f"{_name(param)}: "
        raise RequestError(f"{name}{message[:1].lower()}{message[1:].removesuffix('.')}")


def _name(param: click.Parameter) -> str:
    """As the usage line shows it."""
    return param.human_readable_name if isinstance(param, click.Argument) else param.opts[-1]
