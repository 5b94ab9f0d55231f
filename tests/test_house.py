"""The house holds together: the Makefile, the README and the documents say what the code does."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from indexer.cli import COMMANDS, cli
from indexer.commands.config import as_markdown, as_toml, options
from indexer.config import Settings, env_name, load, setting_names
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS]
DEFAULTS = options(Settings.model_construct())


def _targets() -> dict[str, str]:
    """make target → its `python -m …` line."""
    rules = re.findall(r"^([a-z-]+):\n\t\$\(call with_python,(run|dev),(.+)\)$", MAKEFILE, re.MULTILINE)
    return {target: f"python -m {line}" for target, _, line in rules}


def test_every_make_target_is_one_line_that_the_readme_shows() -> None:
    assert set(_targets()) >= {"demo", "run", "test", "lint", "bench", "bench-full"}
    for target, line in _targets().items():
        assert re.search(rf"`make {target}`.*`{re.escape(line)}`", README), target


def test_every_make_target_in_the_pages_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE):
            assert target in _targets(), f"{page.name}: make {target}"


def test_ci_runs_the_readmes_commands() -> None:
    steps = re.findall(r"^step (\S+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps == ["test", "test-slow", "mutants", "lint"]
    assert set(steps) <= set(_targets())
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_reference_file_is_made_from_the_declarations() -> None:
    """To renew it: python -m indexer config show --defaults > config/default.toml"""
    assert (ROOT / "config" / "default.toml").read_text() == as_toml(DEFAULTS, reference=True)


def test_the_reference_file_with_every_line_enabled_is_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "config" / "default.toml").read_text()
    enabled = tmp_path / "enabled.toml"
    enabled.write_text(re.sub(r"^# ([a-z_]+ = )", r"\1", text, flags=re.MULTILINE))
    assert load(enabled) == load()
    assert len(re.findall(r"^# [a-z_]+ = ", text, re.MULTILINE)) == len(setting_names())
    for name in setting_names():
        assert env_name(name) in text


def test_the_reference_file_changes_nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEXER_EPHEMERAL__ENABLED", "true")
    assert load(ROOT / "config" / "default.toml") == load()


def test_the_configuration_page_is_made_from_the_declarations() -> None:
    """To renew its tables: python -m indexer config show --markdown"""
    assert as_markdown(DEFAULTS) in (ROOT / "docs" / "configuration.md").read_text()


def test_every_setting_is_explained() -> None:
    assert [row.name for row in DEFAULTS] == setting_names()
    assert not [row.name for row in DEFAULTS if not row.help]


def test_settings_named_in_the_pages_exist() -> None:
    sections = {name.partition(".")[0] for name in setting_names() if "." in name}
    known = set(setting_names()) | sections
    for page in PAGES:
        for name in re.findall(r"`([a-z]+\.[a-z_]+)`", page.read_text()):
            if name.partition(".")[0] in sections and not name.endswith((".md", ".py")):
                assert name in known, f"{page.name}: {name}"
        for variable in re.findall(r"\bINDEXER_[A-Z_]+[A-Z]\b", page.read_text()):
            assert variable in map(env_name, setting_names()), f"{page.name}: {variable}"


def test_the_pages_that_the_documentation_promises_are_there() -> None:
    names = {page.stem for page in DOCS}
    assert names >= {
        *("index", "quickstart", "configuration", "api", "streams", "operations", "architecture"),
        *("invariants", "gotchas", "glossary", "performance"),
    }
    index = (ROOT / "docs" / "index.md").read_text()
    assert not [name for name in names - {"index"} if f"({name}.md)" not in index]


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_invariants_name_tests_that_exist() -> None:
    text = (ROOT / "docs" / "invariants.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert named
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"


def _command_lines() -> list[tuple[str, list[str]]]:
    """Every `indexer …` line of a shell block in the pages: (page, arguments)."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(
                    r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:python -m )?indexer( .*)?$", line.split("  #")[0]
                )
                if match:
                    found.append((page.name, shlex.split((match[1] or "").split(" | ")[0].split(" > ")[0])))
    return found


def _known(arguments: list[str]) -> None:
    """Follows the arguments through the commands; raises a usage error for what does not exist."""
    command: click.Command = cli
    context = click.Context(cli, info_name="indexer")
    while isinstance(command, click.Group):
        context = command.make_context(command.name, arguments, parent=context, resilient_parsing=True)
        rest = [*context._protected_args, *context.args]
        name, found, arguments = command.resolve_command(context, rest)
        assert found is not None, name
        command = found
    command.make_parser(click.Context(command, parent=context)).parse_args(list(arguments))


def test_commands_in_the_pages_exist_with_their_options() -> None:
    lines = _command_lines()
    assert len(lines) > 5
    for page, arguments in lines:
        try:
            _known(arguments)
        except click.UsageError as error:
            pytest.fail(f"{page}: indexer {' '.join(arguments)}: {error.message}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_answers_help(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.get_help(click.Context(command, info_name=name))


# --- .ci/interpreter: which Python a target runs with ---


def _house(tmp_path: Path) -> Path:
    """A copy of what the choice of an interpreter depends on."""
    house = tmp_path / "house"
    (house / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "interpreter", house / ".ci" / "interpreter")
    shutil.copy(ROOT / "pyproject.toml", house / "pyproject.toml")
    return house


def _choose(house: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/sh", str(house / ".ci" / "interpreter"), "dev"],
        env={"PATH": os.environ["PATH"], "PYTHON": python, **environment},
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


# Answers as a new Python without our dependencies does, and writes down what it is asked.
_BARE_PYTHON = """
echo "$@" >> "$CALLS"
case "$1" in
    -) echo "aiohttp, cbor2"; exit 1 ;;
    -m) if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi ;;
esac
"""


def test_the_current_interpreter_is_used_when_it_has_everything(tmp_path: Path) -> None:
    chosen = _choose(_house(tmp_path), sys.executable)
    assert (chosen.returncode, chosen.stdout.strip(), chosen.stderr) == (0, sys.executable, "")


def test_an_old_or_absent_interpreter_is_refused_in_one_line(tmp_path: Path) -> None:
    old = _script(tmp_path / "python3", '[ "$1" = -V ] && { echo Python 3.9.2; exit 0; }\nexit 1\n')
    house = _house(tmp_path)
    refused = _choose(house, str(old))
    assert refused.returncode == 1
    assert refused.stderr == f"PYTHON={old} is Python 3.9.2; Python 3.11 or newer is needed.\n"
    assert _choose(house, "no-such-python").stderr.startswith("PYTHON=no-such-python is not there")
    (tmp_path / "dirname").symlink_to(shutil.which("dirname") or "/usr/bin/dirname")
    found = _choose(house, "", PATH=str(tmp_path))
    assert found.returncode == 1
    assert found.stderr.startswith("Python 3.11 or newer is needed, and this machine has Python 3.9.2.")
    assert found.stderr.count("\n") == 1


def test_a_bare_interpreter_gets_an_environment_once_and_again_when_the_project_changes(
    tmp_path: Path,
) -> None:
    house = _house(tmp_path)
    calls = tmp_path / "calls"
    python = _script(tmp_path / "python3", _BARE_PYTHON)

    def installs() -> int:
        return calls.read_text().count("pip install")

    first = _choose(house, str(python), CALLS=str(calls))
    assert first.stdout.strip() == str(house / ".venv" / "bin" / "python")
    assert "lacks aiohttp, cbor2; installing into .venv (once)" in first.stderr
    assert first.stderr.count("\n") == 1
    second = _choose(house, str(python), CALLS=str(calls))
    assert (second.stdout, second.stderr, installs()) == (first.stdout, "", 1)
    with (house / "pyproject.toml").open("a") as project:
        project.write("\n")
    assert _choose(house, str(python), CALLS=str(calls)).returncode == 0
    assert installs() == 2


def test_a_failed_installation_is_told_in_one_line_and_tried_again(tmp_path: Path) -> None:
    house = _house(tmp_path)
    failing = _BARE_PYTHON + 'case "$*" in *"pip install"*) echo ERROR: no network >&2; exit 1 ;; esac\n'
    python = _script(tmp_path / "python3", failing)
    for _ in range(2):
        failed = _choose(house, str(python), CALLS=str(tmp_path / "calls"))
        assert failed.returncode == 1
        assert "pip could not install the dependencies: ERROR: no network" in failed.stderr


def test_the_check_reads_the_projects_own_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    for requirement in project["dependencies"] + project["optional-dependencies"]["dev"]:
        assert re.fullmatch(r"[A-Za-z0-9-]+>=[\d.]+(; .+)?", requirement), requirement
