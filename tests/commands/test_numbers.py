"""Options that take a number refuse what is none, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from indexer.cli import cli, main
from indexer.commands.numbers import Finite


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_is_finite(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["host", "limit", "pds.test", "--requests-per-s", value])
    assert ended.value.code == 2
    assert f"'--requests-per-s': {value} is not" in capsys.readouterr().err


def _commands(group: click.Group) -> Iterator[click.Command]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from _commands(command) if isinstance(command, click.Group) else [command]


def test_every_number_of_every_command_is_such_a_one() -> None:
    options = [option for command in _commands(cli) for option in command.params]
    numbers = [
        each for each in options if isinstance(each.type, (click.FloatRange, click.types.FloatParamType))
    ]
    assert len(numbers) >= 5
    assert [each.name for each in numbers if not isinstance(each.type, Finite)] == []
