"""Settings: sources and their order, the forms of values, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from indexer.config import Settings, env_name, load, parse_duration, setting_names
from indexer.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("INDEXER_"):
            monkeypatch.delenv(name)


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return path


def test_defaults_need_no_file() -> None:
    settings = load()
    assert settings.filter.mode == "filter"
    assert settings.public.bind == "127.0.0.1:3000"
    assert settings.events.retention is None


def test_environment_beats_file_and_overrides_beat_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, 'verifiers = 2\nmemory_mib = 64\n[filter]\nmode = "full"\n')
    monkeypatch.setenv("INDEXER_VERIFIERS", "3")
    monkeypatch.setenv("INDEXER_FILTER__SIGNALS", "app.bsky.*, com.example.thing")
    monkeypatch.setenv("INDEXER_MEMORY_MIB", "96")
    settings = load(path, {"memory_mib": 128})
    assert (settings.verifiers, settings.memory_mib, settings.filter.mode) == (3, 128, "full")
    assert load(path).memory_mib == 96
    assert load(path, environment=False).memory_mib == 64
    assert Settings().verifiers == 1
    assert settings.filter.signals == ["app.bsky.*", "com.example.thing"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("300s", 300), ("60m", 3600), ("3d", 259200), ("250ms", 0.25), ("7", 7), ("1.5h", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("verifierz = 2", "unknown setting: verifierz"),
        ("[gc]\nfoo = 1", "unknown setting: gc.foo"),
        ('[filter]\nmode = "all"', "filter.mode"),
        ('[public]\nbind = "3000"', "public.bind"),
        ('[events]\nretention = "a while"', "events.retention"),
        ('[gc]\nttl_interval = "-5s"', "gc.ttl_interval"),
        ("verifiers = -1", "verifiers"),
        ("verifiers = [", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_file(tmp_path, text))
    assert named in str(caught.value)


def test_an_unknown_variable_and_a_missing_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="nowhere.toml"):
        load(tmp_path / "nowhere.toml")
    monkeypatch.setenv("INDEXER_GC__INTERVAL", "5s")
    with pytest.raises(ConfigError, match="INDEXER_GC__INTERVAL"):
        load()


def test_ephemeral_mode_keeps_an_hour_unless_told_otherwise(tmp_path: Path) -> None:
    assert load(_file(tmp_path, "[ephemeral]\nenabled = true")).events.retention == 3600
    told = load(_file(tmp_path, '[ephemeral]\nenabled = true\n[events]\nretention = "5m"'))
    assert told.events.retention == 300
    assert load(overrides={"ephemeral": {"enabled": True}}).events.retention == 3600


def test_every_setting_has_help_and_a_variable_of_its_own() -> None:
    names = setting_names()
    assert len({env_name(name) for name in names}) == len(names)
    for name in names:
        model: type = Settings
        *tables, last = name.split(".")
        for table in tables:
            model = model.model_fields[table].annotation  # type: ignore[attr-defined]
        assert model.model_fields[last].description, name  # type: ignore[attr-defined]
