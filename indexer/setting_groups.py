"""The tables of the settings: each option's name, type, default, unit and help text, declared once.

`indexer.config` joins them into `Settings` and reads them; the forms of values are `indexer.setting_values`.
Those of the servers are `indexer.setting_servers`. Values only.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from indexer.setting_values import (
    Bind,
    CrawlerSources,
    Dids,
    Duration,
    HostRules,
    Items,
    NsidPatterns,
    Overrides,
    Proxies,
    Retention,
    Tiers,
    check_order,
    parse_host_rule,
    parse_tier,
)


class Section(BaseModel):
    """A table of the TOML file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FilterSettings(Section):
    mode: Literal["full", "filter"] = Field(
        "filter", description="`full` follows every account that is seen; `filter` follows what is asked for"
    )
    signals: NsidPatterns = Field(
        [], description="collections whose records make an unknown account wanted (`ns.*` allowed)"
    )
    collections: NsidPatterns = Field([], description="collections to keep; empty keeps all (`ns.*` allowed)")
    excludes: Dids = Field([], description="DIDs never to be followed")
    answer_wait: Duration = Field(
        2.0, ge=0, description="how long a changed filter's answer waits for the repositories that it affects"
    )


class NetworkSettings(Section):
    allow_private: bool = Field(
        False, description="permit private, loopback and link-local addresses and http (local networks)"
    )
    connect_to: Overrides = Field(
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
    dns_timeout: Duration = Field(3.0, gt=0, description="time for one DNS question")
    web_requests_per_s: float = Field(
        5.0, gt=0, description="requests a second to one host, for did:web documents and handles"
    )
    domain_requests_per_s: float = Field(
        20.0, gt=0, description="the same to all hosts of one registered domain, and its name servers"
    )
    shared_domains: Items = Field(
        ["bsky.social"], description="domains under which so many have handles that only hosts are paced"
    )
    web_tries: int = Field(
        20, ge=1, description="failures in a row after which a did:web that was never known is given up"
    )


class PlcSettings(Section):
    max_requests_per_s: float = Field(50.0, gt=0, description="requests a second to a PLC directory")
    max_pause: Duration = Field(60.0, description="longest pause that a directory may ask for by Retry-After")
    failover_time: Duration = Field(
        60.0, description="how long a directory that gave no answer is asked after the others"
    )


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
    verify_timeout: Duration = Field(
        20.0, gt=0, description="longest time that a verifier process may take for one batch"
    )
    inflight_batches: int = Field(8, ge=1, description="batches under verification for a source")
    inflight_mib: int = Field(64, ge=1, description="bytes of frames under verification for a source")
    socket_frames: int = Field(
        4, ge=1, description="frames that a source's socket may hold before the host is slowed down"
    )
    receive_timeout: Duration = Field(
        60.0, gt=0, description="silence, pings included, after which a connection is dropped"
    )
    reconnect_max: Duration = Field(60.0, gt=0, description="longest wait between connection attempts")
    retry_after_max: Duration = Field(
        3600.0, description="longest wait that an upstream may ask for by Retry-After"
    )
    max_sources: int = Field(256, ge=1, description="upstreams followed at one time, settings included")
    ready_sources: Literal["none", "any", "all"] = Field(
        "any", description="upstreams that must be connected for `/readyz` to say yes"
    )
    buffer_frames_per_repo: int = Field(1000, ge=1, description="frames that wait for one repository")
    buffer_kib_per_repo: int = Field(16384, ge=1, description="KiB that wait for one repository")
    buffer_mib: int = Field(1024, ge=1, description="MiB of waiting frames in total, unproven ones aside")
    unproven_frames_per_repo: int = Field(
        250, ge=1, description="frames that wait for one repository without a signature that is known to hold"
    )
    unproven_mib: int = Field(
        128, ge=1, description="MiB of such frames in total; at the limit who has most of them loses them"
    )
    unproven_age: Duration = Field(
        86400.0, gt=0, description="how long such a frame waits for an identity that cannot be had"
    )
    max_unresolved: int = Field(
        1_000_000, ge=1, description="accounts followed that were only heard of and no directory knows so far"
    )
    max_strangers: int = Field(
        10_000, ge=1, description="accounts that one PDS named and no directory has said to live there so far"
    )
    unknown_grace: Duration = Field(
        600.0,
        ge=0,
        description="how long an account is kept that was heard of and that the directory does not know",
    )
    max_future: Duration = Field(300.0, description="how far a rev may lie in the future")
    first_sight_wait: Duration = Field(
        5.0, description="how long a new account's first commit is awaited before its repository is fetched"
    )
    refresh_interval: Duration = Field(
        10.0, description="shortest time between two questions about one account, and to one handle"
    )
    work_repos: int = Field(100_000, ge=1, description="repositories with due work that are kept in memory")
    work_retry_min: Duration = Field(1.0, gt=0, description="first wait after a question that failed")
    work_retry_max: Duration = Field(300.0, gt=0, description="longest wait after a question that failed")
    host_questions: int = Field(
        4, ge=1, description="questions at one time to one host about its accounts; twice as many to a domain"
    )

    @model_validator(mode="after")
    def _retries_in_order(self) -> Self:
        check_order(self, "work_retry_min", "work_retry_max")
        return self


class BackfillSettings(Section):
    concurrency: int = Field(8, ge=1, description="repositories fetched at one time")
    per_host: int = Field(4, ge=1, description="fetches at one time from one host")
    memory_workers: int = Field(
        1, ge=0, le=64, description="processes that verify repositories and rebuild trees; 0 is the daemon's"
    )
    disk_workers: int = Field(
        1, ge=0, le=64,
        description="processes for repositories above `backfill.verify_mib`; 0, as without memory_workers:"
        " no other ones",
    )  # fmt: skip
    verify_timeout: Duration = Field(
        600.0, gt=0, description="longest time that such a process may take for one repository"
    )
    source: Literal["pds", "relay"] = Field("pds", description="where getRepo is asked first")
    max_car_mib: int = Field(2048, ge=1, description="largest repository CAR")
    max_nodes: int = Field(5_000_000, ge=1, description="most tree nodes and records of one repository")
    max_wire_mib: int = Field(2048, ge=1, description="most of one CAR as it is sent, compressed or not")
    gzip: bool = Field(True, description="let hosts compress the CARs that they send")
    inflight_mib: int = Field(256, ge=1, description="bytes of CARs fetched and not yet verified")
    parsed_mib: int = Field(256, ge=1, description="bytes of CARs under verification, or not yet applied")
    window: int = Field(8000, ge=16, description="due repositories kept in memory, of one host an eighth")
    stalled_after: Duration = Field(
        2.0, gt=0, description="silence of a host after which its fetch gives its place to another"
    )
    proxies: Proxies = Field(
        [], description="`http://host:port` proxies that fetches go through, in turn; empty: none"
    )
    proxy_rest: Duration = Field(300.0, gt=0, description="longest rest of a proxy that fails")
    memory_kib: int = Field(
        512, ge=0, description="largest CAR kept in memory; a larger one, and one to archive, is spooled"
    )
    verify_mib: int = Field(
        16, ge=1, le=1024, description="largest CAR verified in memory; a larger one is read in windows"
    )
    chunk_records: int = Field(1000, ge=1, description="records applied in one step")
    chunk_kib: int = Field(4096, ge=1, description="record bytes applied in one step")
    timeout: Duration = Field(300.0, gt=0, description="time for one fetch")
    min_kib_per_s: float = Field(8.0, ge=0, description="slowest fetch that is tolerated")
    max_mib_per_s: float = Field(16.0, gt=0, description="fastest rate at which one CAR is read")
    grace: Duration = Field(20.0, gt=0, description="time until a fetch is judged by its speed")
    retry_min: Duration = Field(5.0, gt=0, description="first wait after a failed fetch")
    retry_max: Duration = Field(3600.0, gt=0, description="longest wait after a failed fetch")
    min_rev_tries: int = Field(5, ge=1, description="fetches below min_rev before one is taken marked")
    sparse: bool = Field(True, description="fetch only what `filter.collections` keeps, where that is less")
    sparse_min_records: int = Field(2000, ge=0, description="what looks smaller is fetched whole anyway")
    sparse_share: float = Field(0.25, gt=0, le=1, description="wanted part above which all is fetched")
    sparse_blocks: int = Field(100, ge=1, le=100, description="blocks asked for in one request")
    sparse_parallel: int = Field(4, ge=1, le=64, description="such requests at one time for one repository")
    sparse_rounds: int = Field(128, ge=1, description="rounds of such requests after which all is fetched")
    sparse_mib: int = Field(64, ge=1, description="most bytes received for a part; beyond, all is fetched")
    sparse_proof_kib: int = Field(
        1024, ge=1, description="most bytes of a proof that leads into the tree; beyond, all is fetched"
    )
    sparse_step: Duration = Field(
        0.01, ge=0, description="time for the nodes of a part until everything else gets its turn"
    )
    sparse_restarts: int = Field(3, ge=0, description="newer commits met on the way until all is fetched")
    sparse_recheck: Duration = Field(
        86400.0, gt=0, description="time until a part is asked for again where the whole was needed"
    )
    sparse_remembered: int = Field(10_000, ge=0, description="repositories known to be better fetched whole")

    @model_validator(mode="after")
    def _retries_in_order(self) -> Self:
        check_order(self, "retry_min", "retry_max")
        return self


class HostSettings(Section):
    tiers: Tiers = Field(
        ["trusted=16/200/0"],
        description="`name=FETCHES/REQUESTS_PER_S/ACCOUNTS` (0: no limit), beside `default`, which is"
        " `backfill.per_host`, `hosts.requests_per_s` and `hosts.account_limit`",
    )
    rules: HostRules = Field(
        ["*.host.bsky.network=trusted"], description="`pattern=tier`; the first that fits a host counts"
    )
    requests_per_s: float = Field(
        50.0, ge=0, description="requests a second to one host of the tier `default`; 0 is no limit"
    )
    account_limit: int = Field(
        0, ge=0, description="accounts above which a host of the tier `default` is held back; 0 is no limit"
    )
    faults: int = Field(3, ge=1, description="failures in a row after which a host is left alone")
    rate_limit_wait: Duration = Field(
        10.0, gt=0, description="first wait after a 429 that does not say how long"
    )
    idle_after: Duration = Field(604800.0, gt=0, description="time without an answer until a host is idle")
    in_memory: int = Field(10_000, ge=64, description="hosts whose state is kept in memory")
    max_decided: int = Field(10_000, ge=1, description="hosts with a tier, limits or a ban of their own")
    save_interval: Duration = Field(5.0, gt=0, description="longest time until a host's state is stored")
    recheck: Duration = Field(
        86400.0, gt=0, description="time until repositories of a host that is held back are looked at again"
    )

    @model_validator(mode="after")
    def _known_tiers(self) -> Self:
        names = {parse_tier(tier)[0] for tier in self.tiers} | {"default"}
        for rule in self.rules:
            if parse_host_rule(rule)[1] not in names:
                raise ValueError(f"rules: {rule!r} names no tier; there are {', '.join(sorted(names))}")
        return self


class CrawlerSettings(Section):
    sources: CrawlerSources = Field(
        [],
        description="`[mode::]https://host`; modes: `list_repos` (a relay or PDS; default), `by_collection`"
        " (listReposByCollection), `hosts` (listHosts; each host is then asked for its repositories)",
    )
    max_sources: int = Field(64, ge=1, description="sources at one time, settings included")
    interval: Duration = Field(43200.0, gt=0, description="time from a sweep's beginning to the next one's")
    concurrency: int = Field(4, ge=1, description="sources and hosts asked for a page at one time")
    pages_per_s: float = Field(5.0, gt=0, description="pages a second that one source or host is asked for")
    page_size: int = Field(1000, ge=1, le=2000, description="entries asked for in one page, if allowed")
    max_page_kib: int = Field(4096, ge=1, description="largest page")
    max_pages: int = Field(200_000, ge=1, description="pages of a source after which a sweep gives up")
    host_pages: int = Field(5000, ge=1, description="pages of a listed host after which its sweep gives up")
    page_tries: int = Field(5, ge=1, description="malformed answers in a row that end a sweep")
    retry_min: Duration = Field(5.0, gt=0, description="first wait after a failed page or question")
    retry_max: Duration = Field(3600.0, gt=0, description="longest wait after a failed page or question")
    max_hosts: int = Field(10_000, ge=1, description="hosts kept that `hosts` sources listed")
    max_collections: int = Field(
        500, ge=1, description="collections asked for in one sweep, the largest of those seen for a `ns.*`"
    )
    max_queued: int = Field(
        20_000, ge=1, description="repositories due or unchecked at which sweeps pause, until half is left"
    )
    checks: int = Field(8, ge=1, description="accounts at one time whose PDS is asked for their collections")
    check_tries: int = Field(8, ge=1, description="failures after which an account is not asked about again")
    check_ttl: Duration = Field(604800.0, gt=0, description="how long an account without a signal is left")
    max_checked: int = Field(1_000_000, ge=0, description="accounts without a signal that are remembered")

    @model_validator(mode="after")
    def _retries_in_order(self) -> Self:
        check_order(self, "retry_min", "retry_max")
        return self


class ArchiveSettings(Section):
    cars: bool = Field(False, description="keep the CAR of every repository that is fetched")
    zstd_level: int = Field(
        3, ge=1, le=22, description="zstd level of archived CARs; 19 saves a fifth and takes 200 times longer"
    )
    keep_per_repo: int = Field(1, ge=1, description="archived CARs kept of one repository, the newest ones")


class AuditSettings(Section):
    repos_per_minute: float = Field(4.0, ge=0, le=6000, description="repositories audited a minute; 0 is off")
    rev_pages_per_s: float = Field(
        2.0,
        gt=0,
        le=100,
        description="listRepos pages read a second when revs are compared after a possible loss",
    )
    rev_delay: Duration = Field(
        60.0,
        description="time between a possible loss and the comparison of revs, for what is still on its way",
    )
    rev_max_pages: int = Field(100_000, ge=1, description="listRepos pages after which a comparison gives up")


class LogSettings(Section):
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe level that is written"
    )
    format: Literal["console", "json"] = Field("console", description="form of the log lines")
