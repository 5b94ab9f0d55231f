"""Settings: every option, declared once.

Owns names, types, defaults, units and help texts; reads the TOML file and then the environment
(``INDEXER_`` + name in capitals, ``__`` for the dot; lists are comma-separated). Whatever is unknown
or malformed stops the start with a `ConfigError` that names it. No other module reads the environment.
The forms of values are `indexer.setting_values`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from indexer.errors import ConfigError
from indexer.setting_values import (
    Bind,
    Dids,
    Directories,
    Duration,
    Folder,
    Items,
    Networks,
    NsidPatterns,
    Retention,
    Upstreams,
    check_lists,
    describe,
    is_loopback,
)
from indexer.setting_values import parse_bind as parse_bind
from indexer.setting_values import parse_duration as parse_duration

ENV_PREFIX = "INDEXER_"
#: Settings that are never shown.
SECRETS = frozenset({"management.token"})


class Section(BaseModel):
    """A table of the TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FilterSettings(Section):
    mode: Literal["full", "filter"] = Field(
        "filter", description="`full` follows every account that is seen; `filter` follows what is asked for"
    )
    signals: NsidPatterns = Field(
        [], description="collections whose records make an unknown account wanted (`ns.*` allowed)"
    )
    collections: NsidPatterns = Field([], description="collections to keep; empty keeps all (`ns.*` allowed)")
    excludes: Dids = Field([], description="DIDs never to be followed")


class ListenerSettings(Section):
    bind: Bind = Field("127.0.0.1:3000", description="address:port; port 0 picks a free one")
    trusted_proxies: Networks = Field(
        [], description="addresses or networks whose X-Forwarded-For is believed"
    )
    max_connections: int = Field(4000, ge=1, description="open connections in total")
    max_connections_per_address: int = Field(
        256, ge=1, description="open connections of one address; trusted proxies may have all"
    )
    header_timeout: Duration = Field(
        10.0, gt=0, description="time for a new connection to send its first request's headers"
    )
    idle_timeout: Duration = Field(75.0, gt=0, description="how long a connection waits for its next request")
    max_sockets: int = Field(2000, ge=1, description="WebSocket readers in total")
    max_sockets_per_address: int = Field(100, ge=1, description="WebSocket readers of one address")
    request_timeout: Duration = Field(30.0, gt=0, description="longest time a query may take")
    answer_timeout: Duration = Field(3600.0, gt=0, description="longest time to read one streamed answer")
    min_kib_per_s: float = Field(
        64.0, ge=0, description="slowest mean rate at which a streamed answer may be read"
    )


class ManagementSettings(Section):
    bind: Bind = Field("127.0.0.1:3001", description="address:port; other than loopback needs a token")
    token: str = Field("", description="secret for `Authorization: Bearer` or Basic `admin:<token>`")

    @model_validator(mode="after")
    def _closed_or_secret(self) -> Self:
        if not self.token and not is_loopback(self.bind):
            raise ValueError(
                f"management.bind is {self.bind}, which others can reach: "
                "set management.token, or bind to 127.0.0.1"
            )
        return self


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
    dns_server: Bind = Field("", description="address:port that handle lookups ask; empty: the system's")
    connect_timeout: Duration = Field(5.0, gt=0, description="time to connect to a host")
    timeout: Duration = Field(20.0, gt=0, description="time for one small request")


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
    checkpoint_interval: Duration = Field(300.0, gt=0, description="time between folds of the reference log")
    checkpoint_rows: int = Field(100_000, ge=1, description="unfolded changes that bring the fold forward")
    ttl_interval: Duration = Field(60.0, gt=0, description="time between watermarks and prunes")
    blocks_interval: Duration = Field(60.0, gt=0, description="time between block collections")
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
        60.0, gt=0, description="silence, pings included, after which a connection is dropped"
    )
    reconnect_max: Duration = Field(60.0, gt=0, description="longest wait between connection attempts")
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
    timeout: Duration = Field(300.0, gt=0, description="time for one fetch")
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
    max_concurrent_per_address: int = Field(
        32, ge=1, description="expensive queries of one address at one time"
    )


class StreamSettings(Section):
    batch_events: int = Field(256, ge=1, description="events encoded at once and shared by readers")
    batch_kib: int = Field(512, ge=1, description="KiB of encoded events that end a batch early")
    cache_mib: int = Field(32, ge=1, description="memory for encoded events")
    send_buffer_kib: int = Field(1024, ge=64, description="bytes that may wait in one reader's socket")
    ping_interval: Duration = Field(20.0, gt=0, description="time between pings")
    slow_window: Duration = Field(60.0, gt=0, description="window in which a reader is judged slow")
    slow_min_events_per_s: float = Field(10.0, ge=0, description="less than this, while far behind, is slow")
    slow_lag_events: int = Field(100_000, ge=1, description="how far behind the head counts as far")
    cursor_notice_interval: Duration = Field(
        10.0, gt=0, description="time between notices to a filtered reader"
    )
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

    data_dir: Folder = Field(Path("data"), description="where everything is kept")
    upstreams: Upstreams = Field(
        ["wss://relay1.us-east.bsky.network"], description="`wss://host` is a relay, `pds::wss://host` a PDS"
    )
    plc_urls: Directories = Field(["https://plc.directory"], description="PLC directories, tried in order")
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
        check_lists(tables, Settings)
    if environment:
        tables = _merge(tables, _environment())
    try:
        return Settings(**_merge(tables, overrides or {}))
    except ValidationError as error:
        raise ConfigError(describe(error, SECRETS)) from error


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
