"""The `indexer` command: names its subcommands, imports each only when it is called.

Owns the translation of errors into one line on standard error and an exit code:
0 done, 1 the input, the database or the daemon said no, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import sys
from types import ModuleType

import click

from indexer import __version__
from indexer.commands.early import note_signals
from indexer.errors import IndexerError

#: command name → where its click command lives, and the line shown in the list of commands
COMMANDS = {
    "run": ("indexer.commands.run:run", "Run the daemon."),
    "demo": ("indexer.commands.demo:demo", "Run the daemon against a simulated network; no internet needed."),
    "simulate": ("indexer.commands.simulate:simulate", "Run only the simulated network."),
    "repo": ("indexer.commands.repo:repo", "Follow repositories and look at their state."),
    "source": ("indexer.commands.source:source", "List, add and remove upstreams; set their cursors."),
    "crawler": (
        "indexer.commands.crawler:crawler",
        "List, add and remove the lists of accounts that are read.",
    ),
    "host": ("indexer.commands.host:host", "Look at hosts; set their tiers and limits; ban them."),
    "filter": ("indexer.commands.filter:filter_", "Show and change what is followed and kept."),
    "get": ("indexer.commands.client:get", "Print a record by its at:// URI."),
    "stream": ("indexer.commands.client:stream", "Print the event stream."),
    "db": ("indexer.commands.db:db", "Look after the database: check, compact, back up, restore, migrate."),
    "car": ("indexer.commands.car:car", "Inspect, verify and unpack repository CAR files."),
    "debug": ("indexer.commands.debug:debug", "Look at what was refused."),
    "config": ("indexer.commands.config:config", "Show and check settings."),
}


class _Commands(click.Group):
    """Imports a command's module only when the command is called, so that each starts quickly."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(_imported(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _imported(name: str) -> ModuleType:
    """The module. What modules hold is no garbage: the collector neither looks at it while the module and
    what it needs are imported, which would take a tenth longer, nor in the daemon's every full collection,
    which would keep the event loop for some 50 ms."""
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """An AT Protocol indexer: follows the firehose, verifies everything, serves what it knows."""


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; never shows a traceback for an error that we raise on purpose."""
    if (sys.argv[1:] if arguments is None else arguments)[:1] == ["run"]:
        note_signals()  # what it imports takes a second
    try:
        code = cli.main(arguments, standalone_mode=False)
    except IndexerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
