"""The container image and the compose file, read as their engines read them, keep what they promise."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, NamedTuple

import pytest

from indexer.cli import COMMANDS
from indexer.config import env_name, load, parse_bind, parse_duration, setting_names
from tests.paths import ROOT


class Instruction(NamedTuple):
    """One Dockerfile instruction: its word in capitals, the rest of the line."""

    word: str
    rest: str


def _dockerfile() -> list[list[Instruction]]:
    """The stages, each a list of instructions beginning with FROM."""
    text = (ROOT / "docker" / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    stages: list[list[Instruction]] = []
    for line in filter(None, lines.replace("\\\n", " ").splitlines()):
        word, _, rest = line.partition(" ")
        assert word in {
            *("FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE"),
            *("STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
        }, line
        if word == "FROM":
            stages.append([])
        stages[-1].append(Instruction(word, " ".join(rest.split())))
    return stages


def _one(stage: list[Instruction], word: str) -> str:
    found = [each.rest for each in stage if each.word == word]
    assert len(found) == 1, word
    return found[0]


def _environment(stage: list[Instruction]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(_one(stage, "ENV")))


BUILD, FINAL = _dockerfile()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_two_stages_on_a_python_that_the_project_supports() -> None:
    for stage in (BUILD, FINAL):
        match = re.match(r"python:3\.(\d+)-slim", _one(stage, "FROM"))
        assert match
        assert int(match[1]) >= 11
    assert not [each for each in FINAL if each.word == "RUN" and "pip" in each.rest]


def _ignored(path: str) -> bool:
    """.dockerignore's verdict: the last pattern that matches wins."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and fnmatch.fnmatch(path, pattern):
            verdict = not line.startswith("!")
    return verdict


def test_the_build_copies_what_the_package_is_made_of() -> None:
    copied = [
        source
        for each in BUILD
        if each.word == "COPY"
        for source in each.rest.split()[:-1]
        if not source.startswith("--")
    ]
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not _ignored(source), f"{source} does not reach the builder"
    setuptools = PROJECT["tool"]["setuptools"]
    elsewhere: dict[str, str] = setuptools.get("package-dir", {})
    folders = {elsewhere.get(package, package.partition(".")[0]) for package in setuptools["packages"]}
    needed = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert needed | folders <= set(copied)


def test_every_package_is_installed() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    elsewhere: dict[str, str] = setuptools.get("package-dir", {})
    found = {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for file in (ROOT / "indexer").rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found | set(elsewhere)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in elsewhere.values())


@pytest.mark.parametrize("path", [".git", ".venv", "data", "tests", "bench", "x.car", ".env"])
def test_nothing_else_reaches_the_builder(path: str) -> None:
    assert _ignored(path)


def test_a_numeric_user_that_is_not_root_owns_the_data() -> None:
    user = _one(FINAL, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert f"chown {user} /data" in _one(FINAL, "RUN")
    words = [each.word for each in FINAL]
    assert words.index("RUN") < words.index("USER") < words.index("ENTRYPOINT")
    assert _one(FINAL, "VOLUME") == "/data"


def test_the_environment_is_of_known_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {k: v for k, v in _environment(FINAL).items() if k.startswith("INDEXER_")}
    assert set(environment) <= set(map(env_name, setting_names()))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load()
    assert str(settings.data_dir) == "/data"
    assert settings.public.bind == "0.0.0.0:3000"
    assert parse_bind(settings.management.bind)[0] == "127.0.0.1", "management stays inside the container"
    assert _one(FINAL, "EXPOSE") == "3000"


def test_it_starts_the_daemon_and_stops_it_by_the_signal_that_drains() -> None:
    entry = json.loads(_one(FINAL, "ENTRYPOINT"))
    assert entry == ["indexer"]
    assert entry[0] in PROJECT["project"]["scripts"]
    assert json.loads(_one(FINAL, "CMD")) == ["run"]
    assert "run" in COMMANDS
    assert _one(FINAL, "STOPSIGNAL") == "SIGTERM"


def _daemon(status: int, asked: list[str]) -> type[BaseHTTPRequestHandler]:
    """Answers every request with ``status`` and notes its path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_the_health_check_believes_the_daemon(status: int, healthy: bool) -> None:
    check = _one(FINAL, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    assert "127.0.0.1:3000/health'" in command[2]
    asked: list[str] = []
    with HTTPServer(("127.0.0.1", 0), _daemon(status, asked)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code = command[2].replace(":3000", f":{server.server_port}")
        outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        server.shutdown()
    assert (outcome.returncode == 0) is healthy
    assert asked == ["/health"]


def _yaml(text: str) -> Any:
    """The small part of YAML that the compose file uses: nested maps, lists of scalars, quoted strings."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    def scalar(word: str) -> Any:
        return json.loads(word) if word.startswith('"') else word or None

    def block(indent: int) -> Any:
        items: list[Any] = []
        table: dict[str, Any] = {}
        while lines and len(lines[0]) - len(lines[0].lstrip()) == indent:
            line = lines.pop(0).strip()
            if line.startswith("- "):
                items.append(scalar(line[2:]))
                continue
            key, _, value = line.partition(":")
            deeper = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
            table[key] = block(deeper) if not value.strip() and deeper > indent else scalar(value.strip())
        return items or table

    tree = block(0)
    assert not lines, f"not understood: {lines[0]}"
    return tree


def test_compose_keeps_the_data_and_waits_for_the_drain() -> None:
    tree = _yaml((ROOT / "docker" / "compose.yaml").read_text())
    service = tree["services"]["indexer"]
    build = service["build"]
    assert (ROOT / "docker" / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    volume, _, where = service["volumes"][0].partition(":")
    assert where == _environment(FINAL)["INDEXER_DATA_DIR"]
    assert volume in tree["volumes"], "a named volume, so that the data outlives the container"
    assert parse_duration(service["stop_grace_period"]) > 10, "a drain may take 10 s"
    assert service["ports"] == ["127.0.0.1:3000:3000"]
    assert set(service["environment"]) <= set(map(env_name, setting_names()))
