"""`indexer config show|check`, and the texts of config/default.toml and the settings reference.

Both texts are made from the declarations in `indexer.config`; a test holds the stored files to them.
No settings of its own, no I/O but reading the file that is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import click
import orjson
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from indexer.commands.paths import NamedPath
from indexer.config import SECRETS, Section, Settings, env_name, load
from indexer.setting_values import Bind, Duration, Items, Retention

#: How a bound of a value is named, by its attribute.
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}

_TOML_HEAD = """\
# Every setting with its default. Remove the "# " before a line to change it, then
#   indexer run --config default.toml
# The environment variable named above each line wins over the file (lists comma-separated there).
# An unknown or malformed setting stops the start with an error that names it.
"""


class Option(NamedTuple):
    """One setting: dotted name, kind of value in words, value and help."""

    name: str
    kind: str
    value: Any
    help: str


def options(settings: Settings) -> list[Option]:
    """Every setting with its value in ``settings``, in the order of declaration."""
    return list(_options(settings, ""))


def _options(section: BaseModel, prefix: str) -> Iterator[Option]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield Option(prefix + name, _kind(field), _plain(field, value), field.description or "")


def _is(field: FieldInfo, alias: Any) -> bool:
    return alias.__metadata__[0] in field.metadata


def _kind(field: FieldInfo) -> str:
    """The kind of value, with its bounds."""
    return ", ".join([_word(field), *_bounds(field)])


def _bounds(field: FieldInfo) -> Iterator[str]:
    """What a number or duration must lie between; that a duration is never negative goes without saying."""
    duration = _is(field, Duration)
    found: dict[str, str] = {}
    for name, bound in product(_BOUNDS, field.metadata):
        value = getattr(bound, name, None)
        if value or (value == 0 and not (duration and name == "ge")):
            found[name] = duration_text(value) if duration and value else str(value)
    if {"ge", "le"} <= found.keys():
        yield f"{found['ge']} to {found['le']}"
    else:
        yield from (f"{_BOUNDS[name]} {text}" for name, text in found.items())


def _word(field: FieldInfo) -> str:
    for alias, words in ((Duration, "duration"), (Retention, "duration, `forever`"), (Items, "list")):
        if _is(field, alias):
            return words
    if _is(field, Bind):
        return "address:port"
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(field.annotation))
    names: dict[Any, str] = {bool: "true, false", int: "whole number", float: "number", Path: "path"}
    return names.get(field.annotation, "text")


def _plain(field: FieldInfo, value: Any) -> Any:
    """The value as it is written in TOML."""
    if _is(field, Retention):
        return "forever" if value is None else duration_text(value)
    if _is(field, Duration):
        return duration_text(value)
    return str(value) if isinstance(value, Path) else value


def duration_text(seconds: float) -> str:
    """The shortest exact way to write a duration: ``3d``, ``12h``, ``300s``, ``250ms``."""
    for unit, size in (("d", 86400), ("h", 3600), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{int(seconds // size)}{unit}"
    return f"{seconds * 1000:g}ms" if seconds % 1 else f"{seconds:g}s"


def toml_value(value: Any) -> str:
    """A value in TOML; JSON's strings, numbers, booleans and lists are TOML's too."""
    return orjson.dumps(value).decode().replace('","', '", "')


def as_toml(rows: list[Option], *, reference: bool = False) -> str:
    """The settings as a TOML file; with ``reference`` explained, and each value commented out."""
    lines = [_TOML_HEAD] if reference else []
    table = ""
    for row in rows:
        section, _, name = row.name.rpartition(".")
        if section != table:
            lines.append(f"[{section}]" if not lines or reference else f"\n[{section}]")
            table = section
        if reference:
            lines.append(f"# {_sentence(row.help)} ({row.kind}; {env_name(row.name)})".replace("`", ""))
        lines.append(f"{'# ' if reference else ''}{name} = {toml_value(row.value)}")
        if reference:
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def as_markdown(rows: list[Option]) -> str:
    """The settings as one Markdown table a section, for docs/configuration.md."""
    lines: list[str] = []
    table = None
    for row in rows:
        section = row.name.rpartition(".")[0]
        if section != table:
            title = f"`{section}`" if section else "Top level"
            lines += ["", f"### {title}", "", "| setting | value | default | meaning |", "|---|---|---|---|"]
            table = section
        default = f"`{toml_value(row.value)}`"
        lines.append(
            f"| `{row.name}`<br>`{env_name(row.name)}` | {row.kind} | {default} | {_sentence(row.help)} |"
        )
    return "\n".join(lines).strip("\n") + "\n"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def cautions(settings: Settings) -> list[str]:
    """What is allowed but perhaps not meant, one sentence each."""
    found = []
    if not settings.upstreams:
        found.append("upstreams is empty: no firehose is followed, repositories are only fetched on request")
    if not settings.plc_urls:
        found.append("plc_urls is empty: no did:plc can be resolved")
    disk = settings.disk
    if disk.soft_floor_mib < disk.hard_floor_mib:
        found.append(
            "disk.soft_floor_mib is below disk.hard_floor_mib: ingest stops before the backfill does"
        )
    backfill = settings.backfill
    if backfill.verify_mib > backfill.max_car_mib:
        found.append(
            "backfill.verify_mib is above backfill.max_car_mib, the largest CAR that is taken at all"
        )
    if settings.ephemeral.enabled and settings.archive.cars:
        found.append("archive.cars has no effect with ephemeral.enabled: nothing is fetched")
    if settings.ephemeral.enabled and not settings.store.blocks:
        found.append("store.blocks = false adds nothing to ephemeral.enabled, which keeps no blocks")
    return found


@click.group()
def config() -> None:
    """Show and check settings."""


_file = click.option("--config", "file", type=NamedPath(dir_okay=False), help="Settings file (TOML).")


@config.command()
@_file
@click.option("--defaults", is_flag=True, help="The reference file with every default, commented.")
@click.option("--markdown", is_flag=True, help="The defaults as Markdown tables.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, dotted name to value.")
def show(file: Path | None, defaults: bool, markdown: bool, as_json: bool) -> None:
    """Print the settings in effect: defaults, then the file, then the environment. Secrets are masked."""
    if defaults or markdown:
        rows = options(Settings.model_construct())
        click.echo(as_markdown(rows) if markdown else as_toml(rows, reference=True), nl=False)
        return
    rows = [
        row._replace(value="********") if row.name in SECRETS and row.value else row
        for row in options(load(file))
    ]
    if as_json:
        click.echo(orjson.dumps({row.name: row.value for row in rows}))
    else:
        click.echo(as_toml(rows), nl=False)


@config.command()
@_file
def check(file: Path | None) -> None:
    """Check a settings file and the environment; exit code 1 and the setting's name when one is wrong."""
    for caution in cautions(load(file)):
        click.echo(f"warning: {caution}", err=True)
    click.echo(f"{file or 'environment'}: ok")
