"""`indexer config show|check`: what is in effect, without secrets, in forms that can be read back."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from indexer.cli import main
from indexer.commands.config import config, duration_text, options, toml_value
from indexer.config import Settings, load, parse_duration, setting_names


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("INDEXER_"):
            monkeypatch.delenv(name)


def _show(*arguments: str) -> str:
    result = CliRunner().invoke(config, ["show", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_what_is_shown_can_be_loaded_again(tmp_path: Path) -> None:
    given = tmp_path / "given.toml"
    given.write_text('verifiers = 3\n[events]\nretention = "90m"\n[filter]\nsignals = ["a.b.*", "c.d.e"]\n')
    shown = tmp_path / "shown.toml"
    shown.write_text(_show("--config", str(given)))
    assert load(shown) == load(given)


def test_the_reference_tells_the_bounds_of_values() -> None:
    kinds = {row.name: row.kind for row in options(Settings.model_construct())}
    assert kinds["memory_mib"] == "whole number, at least 32"
    assert kinds["verifiers"] == "whole number, 0 to 64"
    assert kinds["ingest.max_frame_bytes"] == "whole number, at least 65536"
    assert kinds["backfill.sparse_share"] == "number, above 0, at most 1"
    assert kinds["backfill.grace"] == "duration, above 0"
    assert (kinds["filter.answer_wait"], kinds["filter.signals"]) == ("duration", "list")
    assert "| whole number, at least 32 |" in _show("--markdown")
    assert "(whole number, at least 32; INDEXER_MEMORY_MIB)" in _show("--defaults")


def test_json_has_every_setting_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given.toml"
    given.write_text("verifiers = 3\n")
    monkeypatch.setenv("INDEXER_VERIFIERS", "2")
    values = json.loads(_show("--config", str(given), "--json"))
    assert list(values) == setting_names()
    assert values["verifiers"] == 2
    assert values["events.retention"] == "forever"


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEXER_MANAGEMENT__TOKEN", "tell-nobody")
    assert "tell-nobody" not in _show() + _show("--json")
    assert tomllib.loads(_show())["management"]["token"] == "********"


def test_check_says_ok_or_names_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[filter]\nmode = "full"\n')
    bad.write_text('[filter]\nmode = "half"\n')
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", "--config", str(good)])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"{good}: ok\n")
    with pytest.raises(SystemExit) as ended:
        main(["config", "check", "--config", str(bad)])
    assert ended.value.code == 1
    assert "filter.mode" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0s", "250ms", "1s", "90s", "5400s", "12h", "3d", "1500ms"])
def test_durations_are_written_as_they_are_read(text: str) -> None:
    assert duration_text(parse_duration(text)) == text


@pytest.mark.parametrize("value", [True, 3, 0.5, "a", 'quo"te \\ \n', [], ["a", "b"]])
def test_values_are_valid_toml(value: object) -> None:
    assert tomllib.loads(f"x = {toml_value(value)}") == {"x": value}
