"""Settings: every option, declared once.

Owns the top level and the reading: the TOML file and then the environment
(``INDEXER_`` + name in capitals, ``__`` for the dot; lists are comma-separated). Whatever is unknown
or malformed stops the start with a `ConfigError` that names it. No other module reads the environment.
The tables are `indexer.setting_groups` and `indexer.setting_servers`, the forms of values
`indexer.setting_values`.
"""

from __future__ import annotations

import os
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from indexer.errors import ConfigError
from indexer.setting_groups import ArchiveSettings as ArchiveSettings
from indexer.setting_groups import AuditSettings as AuditSettings
from indexer.setting_groups import BackfillSettings as BackfillSettings
from indexer.setting_groups import CrawlerSettings as CrawlerSettings
from indexer.setting_groups import DiskSettings as DiskSettings
from indexer.setting_groups import DurabilitySettings as DurabilitySettings
from indexer.setting_groups import EphemeralSettings as EphemeralSettings
from indexer.setting_groups import EventsSettings as EventsSettings
from indexer.setting_groups import FilterSettings as FilterSettings
from indexer.setting_groups import GcSettings as GcSettings
from indexer.setting_groups import HostSettings as HostSettings
from indexer.setting_groups import IdentitySettings as IdentitySettings
from indexer.setting_groups import IngestSettings as IngestSettings
from indexer.setting_groups import LogSettings as LogSettings
from indexer.setting_groups import NetworkSettings as NetworkSettings
from indexer.setting_groups import PlcSettings as PlcSettings
from indexer.setting_groups import Section as Section
from indexer.setting_groups import StoreSettings as StoreSettings
from indexer.setting_groups import WriterSettings as WriterSettings
from indexer.setting_servers import ListenerSettings as ListenerSettings
from indexer.setting_servers import ManagementSettings as ManagementSettings
from indexer.setting_servers import MetricsSettings as MetricsSettings
from indexer.setting_servers import StreamSettings as StreamSettings
from indexer.setting_servers import XrpcSettings as XrpcSettings
from indexer.setting_values import CRAWLER_MODES as CRAWLER_MODES
from indexer.setting_values import SUBSCRIBE as SUBSCRIBE
from indexer.setting_values import (
    Directories,
    Folder,
    Upstreams,
    check_lists,
    describe,
    same_address,
)
from indexer.setting_values import check_address as check_address
from indexer.setting_values import parse_bind as parse_bind
from indexer.setting_values import parse_crawler_source as parse_crawler_source
from indexer.setting_values import parse_duration as parse_duration
from indexer.setting_values import parse_host_rule as parse_host_rule
from indexer.setting_values import parse_override as parse_override
from indexer.setting_values import parse_tier as parse_tier
from indexer.setting_values import upstream_address as upstream_address

ENV_PREFIX = "INDEXER_"
#: Settings that are never shown.
SECRETS = frozenset({"management.token", "backfill.proxies"})


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
    malloc_arenas: int = Field(
        1, ge=0, description="arenas of the C library (glibc), fewer take less memory; 0 is its own choice"
    )
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
    hosts: HostSettings = HostSettings()
    crawler: CrawlerSettings = CrawlerSettings()
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

    @model_validator(mode="after")
    def _addresses_apart(self) -> Self:
        """Each listener has an address of its own."""
        binds = {"public.bind": self.public.bind, "management.bind": self.management.bind}
        if self.metrics.bind:
            binds["metrics.bind"] = self.metrics.bind
        for (one, this), (other, that) in combinations(binds.items(), 2):
            if same_address(this, that):
                raise ValueError(f"{one} and {other} are the same address ({that}); give each one of its own")
        return self

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
