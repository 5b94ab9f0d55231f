"""Settings: sources and their order, the forms of values, and errors that name what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from indexer.commands.config import cautions
from indexer.config import Settings, env_name, load, parse_duration, setting_names, upstream_address
from indexer.errors import ConfigError
from tests.paths import ROOT


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
        ('data_dir = ""', "data_dir: it is empty"),
        (
            'upstreams = "wss://relay.test"',
            'upstreams: a list belongs here: upstreams = ["wss://relay.test"]',
        ),
        ('[filter]\nsignals = "a.b.c"', "filter.signals: a list belongs here"),
        ('upstreams = ["relay.test"]', "upstreams: not a URL"),
        ('upstreams = ["https://relay.test"]', "upstreams: not a URL"),
        ('upstreams = ["wss://"]', "upstreams: not a URL"),
        ('upstreams = ["wss://relay.test:port"]', "upstreams: not a URL"),
        ('upstreams = ["pds::relay.test"]', "upstreams: not a URL"),
        ('plc_urls = ["wss://plc.test"]', "plc_urls: not a URL"),
        ('[filter]\nsignals = ["app.*.b"]', "filter.signals"),
        ('[filter]\ncollections = ["*"]', "filter.collections"),
        ('[filter]\nexcludes = ["alice.test"]', "filter.excludes"),
        ('[public]\ntrusted_proxies = ["10.0.0.0/33"]', "public.trusted_proxies"),
        ('[network]\ndns_server = "9.9.9.9"', "network.dns_server"),
        ('[management]\nbind = "0.0.0.0:3001"', "set management.token"),
        ('[management]\nbind = "[::]:3001"', "set management.token"),
        ('[events]\nretention = "5"', "events.retention: '5' has no unit; write it as 60m"),
        *((f"[gc]\n{name} = 0", f"gc.{name}") for name in ("checkpoint_interval", "blocks_interval")),
        ('[gc]\nttl_interval = "0s"', "gc.ttl_interval"),
        ('[public]\nrequest_timeout = "0s"', "public.request_timeout"),
        *((f"[backfill]\n{name} = 0", f"backfill.{name}") for name in ("retry_min", "retry_max", "grace")),
        *((f"[backfill]\nmin_kib_per_s = {text}", "finite number") for text in ("inf", "nan")),
        ("[public]\nmin_kib_per_s = inf", "public.min_kib_per_s"),
        ('[backfill]\nretry_min = "2h"', "setting backfill: retry_min (7200 s) is above retry_max (3600 s)"),
        ('[crawler]\nretry_max = "1s"', "setting crawler: retry_min (5 s) is above retry_max (1 s)"),
        (
            '[ingest]\nwork_retry_min = "1h"',
            "setting ingest: work_retry_min (3600 s) is above work_retry_max",
        ),
        (
            '[crawler]\nsources = ["https://a.test", "list_repos::https://A.test:443"]',
            "crawler.sources: 'list_repos::https://A.test:443' is the source 'https://a.test' once more",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(_file(tmp_path, text))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        'upstreams = ["ws://127.0.0.1:2470", "pds::wss://pds.test", "wss://relay.test:8443"]',
        'plc_urls = ["http://127.0.0.1:2582", "https://plc.test/"]',
        "upstreams = []",
        '[management]\nbind = "0.0.0.0:3001"\ntoken = "t"',
        '[management]\nbind = "[::1]:3001"',
        '[filter]\nsignals = ["app.bsky.*", "a.b.c"]\nexcludes = ["did:web:a.b"]',
        "[events]\nretention = 3600",
        '[crawler]\nsources = ["https://a.test", "hosts::https://a.test", "http://a.test", "https://a.test:80"]',
        '[backfill]\nretry_min = "1h"',
    ],
)
def test_what_is_right_is_taken(tmp_path: Path, text: str) -> None:
    load(_file(tmp_path, text))


def test_no_message_shows_a_secret(tmp_path: Path) -> None:
    for text in ('upstreams = ["wss://user:s3cret@relay.test"]', '[management]\ntoken = ["s3cret"]'):
        with pytest.raises(ConfigError, match=r"upstreams|management\.token") as caught:
            load(_file(tmp_path, text))
        assert "s3cret" not in str(caught.value)


def test_a_list_in_the_environment_is_not_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEXER_UPSTREAMS", '["wss://relay.test"]')
    with pytest.raises(ConfigError, match=r"upstreams: JSON is not understood here; .* commas"):
        load()


def test_nothing_to_follow_is_said() -> None:
    assert cautions(load()) == []
    told = cautions(load(overrides={"upstreams": [], "plc_urls": []}))
    assert [text.partition(" ")[0] for text in told] == ["upstreams", "plc_urls"]


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


def test_every_setting_has_an_effect() -> None:
    declared = ("config.py", "setting_groups.py")
    files = [path for path in (ROOT / "indexer").rglob("*.py") if path.name not in declared]
    sources = [path.read_text() for path in files]
    text = "\n".join(sources)
    unused = [name for name in setting_names() if not re.search(rf"\.{name.rpartition('.')[2]}\b", text)]
    assert unused == []


@pytest.mark.parametrize(
    "again",
    [
        "wss://relay.test/", "WSS://Relay.Test", "wss://relay.test:443", "pds::wss://relay.test",
        "wss://relay.test/xrpc/com.atproto.sync.subscribeRepos",
    ],
)  # fmt: skip
def test_an_upstream_is_named_once_however_it_is_spelt(again: str) -> None:
    with pytest.raises(ConfigError, match="once more"):
        load(overrides={"upstreams": ["wss://relay.test", again]}, environment=False)
    assert upstream_address(again.removeprefix("pds::")) == "wss://relay.test"


def test_an_upstream_has_no_query() -> None:
    with pytest.raises(ConfigError, match="no query"):
        load(overrides={"upstreams": ["wss://relay.test?cursor=1"]}, environment=False)
    assert upstream_address("ws://[::1]:80/under/") == "ws://[::1]/under"
    assert upstream_address("ws://[::1]:443") == "ws://[::1]:443"


@pytest.mark.parametrize("value", ["a:b", "a:1=b:2", "127.0.0.1:1=127.0.0.1:2", "a:1"])
def test_what_the_start_refuses_is_refused_here(value: str) -> None:
    with pytest.raises(ConfigError, match=r"network\.connect_to"):
        load(overrides={"network": {"connect_to": [value]}}, environment=False)


def test_settings_without_an_effect_are_told() -> None:
    tables = {
        "disk": {"soft_floor_mib": 1, "hard_floor_mib": 2},
        "ephemeral": {"enabled": True},
        "archive": {"cars": True},
        "store": {"blocks": False},
        "backfill": {"verify_mib": 100, "max_car_mib": 1},
    }
    told = cautions(load(overrides=tables, environment=False))
    names = ["disk.soft_floor_mib", "backfill.verify_mib", "archive.cars", "store.blocks"]
    assert [text.split()[0] for text in told] == names


@pytest.mark.parametrize(
    ("public", "management", "metrics", "same"),
    [
        ("127.0.0.1:3000", "127.0.0.1:3000", "", "public.bind and management.bind"),
        ("0.0.0.0:3000", "127.0.0.1:3000", "", "public.bind and management.bind"),
        ("127.0.0.1:3000", "127.0.0.1:3001", "127.0.0.1:3001", "management.bind and metrics.bind"),
        ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0", None),
        ("127.0.0.1:3000", "127.0.0.2:3000", "", None),
    ],
)
def test_listeners_need_addresses_of_their_own(
    public: str, management: str, metrics: str, same: str | None
) -> None:
    binds = {"public": {"bind": public}, "management": {"bind": management}, "metrics": {"bind": metrics}}
    if same is None:
        assert load(overrides=binds).public.bind == public
    else:
        with pytest.raises(ConfigError, match=f"^{same} are the same address"):
            load(overrides=binds)
