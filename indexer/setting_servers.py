"""The tables of the settings of servers, as in `indexer.setting_groups`. Values only."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from indexer.setting_groups import Section
from indexer.setting_values import Bind, Duration, Networks, is_loopback


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
