"""Settings: every option, declared once.

Owns names, types, defaults, units and help texts; reads the TOML file and then the environment
(``INDEXER_`` + name in capitals, ``__`` for the dot; lists are comma-separated). Whatever is unknown
or malformed stops the start with a `ConfigError` that names it. No other module reads the environment.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from indexer.errors import ConfigError

ENV_PREFIX = "INDEXER_"
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(value: object) -> float:
    """Seconds from ``"300s"``, ``"60m"``, ``"3d"``, ``"250ms"`` or a bare number of seconds."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)?\s*", str(value))
        if match is None:
            raise ValueError(f"not a duration: {value!r}; write it as 300s, 60m, 12h or 3d")
        seconds = float(match[1]) * _UNITS[match[2] or "s"]
    if not 0 <= seconds < 1e10:
        raise ValueError(f"a duration must not be negative or endless: {value!r}")
    return seconds


def _retention(value: object) -> float | None:
    if value is None or value == "forever":
        return None
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError("retention must be longer than zero, or 'forever'")
    return seconds


def _items(value: object) -> object:
    """A comma-separated string (the environment's form) as a list; anything else as it is."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def parse_bind(value: str) -> tuple[str, int]:
    """``address:port`` split in two; ``[::1]:3000`` for IPv6, ``:3000`` is refused."""
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"not an address:port: {value!r}")
    return host, int(port)


def _bind(value: object) -> object:
    if isinstance(value, str) and value:
        parse_bind(value)
    return value


Duration = Annotated[float, BeforeValidator(parse_duration)]
Retention = Annotated[float | None, BeforeValidator(_retention)]
Items = Annotated[list[str], BeforeValidator(_items)]
Bind = Annotated[str, BeforeValidator(_bind)]


class Section(BaseModel):
    """A table of the TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FilterSettings(Section):
    mode: Literal["full", "filter"] = Field(
        "filter", description="`full` follows every account that is seen; `filter` follows what is asked for"
    )
    signals: Items = Field(
        [], description="collections whose records make an unknown account wanted (`ns.*` allowed)"
    )
    collections: Items = Field([], description="collections to keep; empty keeps all (`ns.*` allowed)")
    excludes: Items = Field([], description="DIDs never to be followed")


class ListenerSettings(Section):
    bind: Bind = Field("127.0.0.1:3000", description="address:port; port 0 picks a free one")
    trusted_proxies: Items = Field([], description="addresses or networks whose X-Forwarded-For is believed")
    max_sockets: int = Field(2000, ge=1, description="WebSocket readers in total")
    max_sockets_per_address: int = Field(100, ge=1, description="WebSocket readers of one address")
    request_timeout: Duration = Field(30.0, description="longest time a query may take")


class ManagementSettings(Section):
    bind: Bind = Field("127.0.0.1:3001", description="address:port; other than loopback needs a token")
    token: str = Field("", description="secret for `Authorization: Bearer` or Basic `admin:<token>`")


class MetricsSettings(Section):
    bind: Bind = Field("", description="an address:port of its own for /metrics; empty: only on management")


class NetworkSettings(Section):
    allow_private: bool = Field(
        False, description="permit private, loopback and link-local addresses and http (local networks)"
    )
    connect_to: Items = Field(
        [],
        description="`host:port=address:port` overrides (curl --connect-to), for tests and local networks",
    )
    dns_server: str = Field("", description="address:port that handle lookups ask; empty: the system's")
    connect_timeout: Duration = Field(5.0, description="time to connect to a host")
    timeout: Duration = Field(20.0, description="time for one small request")


class IdentitySettings(Section):
    cache_entries: int = Field(250_000, ge=1, description="identities kept in memory")
    ttl: Duration = Field(86400.0, description="how long a resolved identity is believed")
    error_ttl: Duration = Field(120.0, description="how long a failed resolution is remembered")
    max_body_kib: int = Field(64, ge=1, description="largest DID document")
    concurrency: int = Field(32, ge=1, description="resolutions at one time")


class PlcSettings(Section):
    max_requests_per_s: float = Field(50.0, gt=0, description="requests a second to a PLC directory")


class StoreSettings(Section):
    blocks: bool = Field(True, description="keep record blocks; off is index-only mode")
    quarantine_entries: int = Field(10_000, ge=1, description="refused frames kept for inspection")
    quarantine_entry_kib: int = Field(64, ge=1, description="KiB of one refused frame that are kept")


class DurabilitySettings(Section):
    flush_interval: Duration = Field(1.0, description="longest loss after a power cut; 0 syncs every commit")


class WriterSettings(Section):
    group_ops: int = Field(5000, ge=1, description="operations that end a group commit")
    group_kib: int = Field(4096, ge=1, description="KiB that end a group commit")
    group_ms: float = Field(5.0, gt=0, description="milliseconds that end a group commit")
    queue_units: int = Field(10_000, ge=1, description="units of work that may wait; callers wait beyond it")


class EventsSettings(Section):
    retention: Retention = Field(
        None, description="how long events are kept: a duration or `forever` (ephemeral mode: 60m)"
    )


class GcSettings(Section):
    checkpoint_interval: Duration = Field(300.0, description="time between folds of the reference log")
    checkpoint_rows: int = Field(100_000, ge=1, description="unfolded changes that bring the fold forward")
    ttl_interval: Duration = Field(60.0, description="time between watermarks and prunes")
    blocks_interval: Duration = Field(60.0, description="time between block collections")
    step_rows: int = Field(2000, ge=1, description="rows handled in one step of a worker")
    wipe_point_rows: int = Field(
        20_000, ge=0, description="rows of a repository above which a wipe is by range"
    )
    compact_after: int = Field(100_000, ge=1, description="reclaimed blocks that bring a compaction")


class EphemeralSettings(Section):
    enabled: bool = Field(False, description="keep no records, only the log within its retention")


class DiskSettings(Section):
    soft_floor_mib: int = Field(2048, ge=0, description="free space below which backfill pauses")
    hard_floor_mib: int = Field(512, ge=0, description="free space below which ingest stops")


class IngestSettings(Section):
    max_frame_bytes: int = Field(5_000_000, ge=65536, description="largest frame, in bytes")
    batch_frames: int = Field(64, ge=1, description="frames handed to a verifier at once")
    inflight_batches: int = Field(8, ge=1, description="batches under verification for a source")
    inflight_mib: int = Field(64, ge=1, description="bytes of frames under verification for a source")
    receive_timeout: Duration = Field(
        60.0, description="silence, pings included, after which a connection is dropped"
    )
    reconnect_max: Duration = Field(60.0, description="longest wait between connection attempts")
    buffer_frames_per_repo: int = Field(1000, ge=1, description="frames that wait for one repository")
    buffer_kib_per_repo: int = Field(16384, ge=1, description="KiB that wait for one repository")
    buffer_mib: int = Field(1024, ge=1, description="MiB of waiting frames in total")
    max_future: Duration = Field(300.0, description="how far a rev may lie in the future")
    first_sight_wait: Duration = Field(
        5.0, description="how long a new account's first commit is awaited before its repository is fetched"
    )
    refresh_interval: Duration = Field(
        10.0, description="shortest time between two questions about one account that bad frames cause"
    )
    work_repos: int = Field(100_000, ge=1, description="repositories with due work that are kept in memory")


class BackfillSettings(Section):
    concurrency: int = Field(8, ge=1, description="repositories fetched at one time")
    per_host: int = Field(4, ge=1, description="fetches at one time from one host")
    processes: int = Field(1, ge=0, le=64, description="processes that verify repositories and rebuild trees")
    source: Literal["pds", "relay"] = Field("pds", description="where getRepo is asked first")
    max_car_mib: int = Field(2048, ge=1, description="largest repository CAR")
    max_nodes: int = Field(5_000_000, ge=1, description="most tree nodes and records of one repository")
    inflight_mib: int = Field(256, ge=1, description="bytes of CARs fetched and not yet applied")
    chunk_records: int = Field(1000, ge=1, description="records applied in one step")
    timeout: Duration = Field(300.0, description="time for one fetch")
    min_kib_per_s: float = Field(8.0, ge=0, description="slowest fetch that is tolerated")
    retry_min: Duration = Field(5.0, description="first wait after a failed fetch")
    retry_max: Duration = Field(3600.0, description="longest wait after a failed fetch")
    min_rev_tries: int = Field(5, ge=1, description="fetches below min_rev before one is taken marked")


class ArchiveSettings(Section):
    cars: bool = Field(False, description="keep the CAR of every repository that is fetched")
    zstd_level: int = Field(
        3, ge=1, le=22, description="zstd level of archived CARs; 19 saves a fifth and takes 200 times longer"
    )
    keep_per_repo: int = Field(1, ge=1, description="archived CARs kept of one repository, the newest ones")


class AuditSettings(Section):
    repos_per_minute: float = Field(4.0, ge=0, le=6000, description="repositories audited a minute; 0 is off")


class XrpcSettings(Section):
    rebuild_max_records: int = Field(
        2_000_000, ge=1, description="largest repository whose tree is rebuilt for an answer"
    )
    tree_cache_mib: int = Field(64, ge=0, description="memory for rebuilt trees")
    max_concurrent: int = Field(256, ge=1, description="expensive queries at one time")


class StreamSettings(Section):
    batch_events: int = Field(256, ge=1, description="events encoded at once and shared by readers")
    cache_mib: int = Field(32, ge=1, description="memory for encoded events")
    send_buffer_kib: int = Field(1024, ge=64, description="bytes that may wait in one reader's socket")
    ping_interval: Duration = Field(20.0, description="time between pings")
    slow_window: Duration = Field(60.0, description="window in which a reader is judged slow")
    slow_min_events_per_s: float = Field(10.0, ge=0, description="less than this, while far behind, is slow")
    slow_lag_events: int = Field(100_000, ge=1, description="how far behind the head counts as far")
    cursor_notice_interval: Duration = Field(10.0, description="time between notices to a filtered reader")
    max_options_kib: int = Field(64, ge=1, description="largest message or filter that a reader may send")


class LogSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is written"
    )
    format: Literal["console", "json"] = Field("console", description="form of the log lines")


class Settings(BaseSettings):
    """All settings. Immutable; parts receive their own section."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        enable_decoding=False,
        extra="forbid",
        frozen=True,
        case_sensitive=False,
    )

    data_dir: Path = Field(Path("data"), description="where everything is kept")
    upstreams: Items = Field(
        ["wss://relay1.us-east.bsky.network"], description="`wss://host` is a relay, `pds::wss://host` a PDS"
    )
    plc_urls: Items = Field(["https://plc.directory"], description="PLC directories, tried in order")
    verifiers: int = Field(1, ge=0, le=64, description="verifier processes; 0 verifies in the daemon itself")
    memory_mib: int = Field(256, ge=32, description="memory of the store: block cache and write buffers")
    filter: FilterSettings = FilterSettings()
    public: ListenerSettings = ListenerSettings()
    management: ManagementSettings = ManagementSettings()
    metrics: MetricsSettings = MetricsSettings()
    network: NetworkSettings = NetworkSettings()
    identity: IdentitySettings = IdentitySettings()
    plc: PlcSettings = PlcSettings()
    store: StoreSettings = StoreSettings()
    durability: DurabilitySettings = DurabilitySettings()
    writer: WriterSettings = WriterSettings()
    events: EventsSettings = EventsSettings()
    gc: GcSettings = GcSettings()
    ephemeral: EphemeralSettings = EphemeralSettings()
    disk: DiskSettings = DiskSettings()
    ingest: IngestSettings = IngestSettings()
    backfill: BackfillSettings = BackfillSettings()
    archive: ArchiveSettings = ArchiveSettings()
    audit: AuditSettings = AuditSettings()
    xrpc: XrpcSettings = XrpcSettings()
    stream: StreamSettings = StreamSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="before")
    @classmethod
    def _ephemeral_retention(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Ephemeral mode keeps 60 minutes of events unless told otherwise."""
        ephemeral = values.get("ephemeral")
        enabled = (
            ephemeral.get("enabled") if isinstance(ephemeral, dict) else getattr(ephemeral, "enabled", False)
        )
        events = values.get("events", {})
        told = not isinstance(events, dict) or "retention" in events
        if str(enabled).lower() in ("true", "1", "yes", "on") and not told:
            return {**values, "events": {**events, "retention": "60m"}}
        return values

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` joins the sources; a bare `Settings()` is the defaults


def setting_names(model: type[BaseModel] = Settings, prefix: str = "") -> list[str]:
    """Every setting's TOML name, dotted, in the order of declaration."""
    names: list[str] = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            names += setting_names(annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def env_name(name: str) -> str:
    """The environment variable of a dotted setting name."""
    return ENV_PREFIX + name.upper().replace(".", "__")


def load(
    file: Path | None = None, overrides: dict[str, Any] | None = None, *, environment: bool = True
) -> Settings:
    """Settings from ``file`` (TOML), then the environment, then ``overrides`` (nested tables).

    Raises `ConfigError` naming the setting, the file or the variable at fault.
    """
    tables: dict[str, Any] = {}
    if file is not None:
        try:
            tables = tomllib.loads(file.read_text())
        except OSError as error:
            raise ConfigError(f"cannot read the settings file {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the settings file {file} is not valid TOML: {error}") from error
    if environment:
        tables = _merge(tables, _environment())
    try:
        return Settings(**_merge(tables, overrides or {}))
    except ValidationError as error:
        raise ConfigError(_describe(error)) from error


def _environment() -> dict[str, Any]:
    """The tables that the environment sets."""
    known = {env_name(name) for name in setting_names()}
    for variable in os.environ:
        if variable.startswith(ENV_PREFIX) and variable.upper() not in known:
            raise ConfigError(f"unknown setting in the environment: {variable}")
    return EnvSettingsSource(Settings)()


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = (
            _merge(merged[key], value)
            if isinstance(value, dict) and isinstance(merged.get(key), dict)
            else value
        )
    return merged


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting: {name}")
        else:
            lines.append(
                f"setting {name}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
            )
    return "; ".join(lines)
