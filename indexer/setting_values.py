"""The forms that setting values have: durations, lists, addresses, URLs, patterns, DIDs.

Owns their parsing and the types that `indexer.config` declares its settings with. Whatever is malformed is
a ValueError that shows the value, but never a secret inside it. Pure; no I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ValidationError

from indexer.atproto.syntax import check_did, check_nsid_pattern
from indexer.errors import ConfigError, SyntaxInvalid

_PDS_PREFIX: Final = "pds::"
#: Path of the firehose below an upstream's address.
SUBSCRIBE: Final = "/xrpc/com.atproto.sync.subscribeRepos"
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
    if isinstance(value, str) and re.fullmatch(r"\s*[\d.]+\s*", value):
        # 5 what? Events that are pruned too early do not come back.
        raise ValueError(f"{value!r} has no unit; write it as 60m, 12h, 3d or forever")
    seconds = parse_duration(value)
    if seconds <= 0:
        raise ValueError(f"retention must be longer than zero, or 'forever': {value!r}")
    return seconds


def _items(value: object) -> object:
    """A comma-separated string (the environment's form) as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        raise ValueError(f"JSON is not understood here; separate the items by commas: {value!r}")
    return [item.strip() for item in value.split(",") if item.strip()]


def parse_bind(value: str) -> tuple[str, int]:
    """``address:port`` split in two; ``[::1]:3000`` for IPv6, ``:3000`` is refused."""
    host, _, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"not an address:port: {value!r}")
    return host, int(port)


def parse_override(value: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """The host and port of ``host:port=address:port``, and the address that is dialled in their place."""
    source, _, target = value.partition("=")
    try:
        host, port = parse_bind(source)
        address = parse_bind(target)
        ip_address(address[0])
    except ValueError:
        raise ValueError(f"{value!r} is not host:port=address:port") from None
    if _is_address(host):
        raise ValueError(f"{value!r} must name a host on its left side")
    return (host.lower(), port), address


def _override(value: str) -> str:
    parse_override(value)
    return value


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def same_address(bind: str, other: str) -> bool:
    """Whether two listeners cannot have these addresses at once."""
    (host, port), (host_2, port_2) = parse_bind(bind), parse_bind(other)
    everywhere = {"0.0.0.0", "::"}
    return port == port_2 != 0 and (host == host_2 or not everywhere.isdisjoint((host, host_2)))


def is_loopback(bind: str) -> bool:
    """Whether only this machine can reach the ``address:port``."""
    host, _ = parse_bind(bind)
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(value: object) -> object:
    if isinstance(value, str) and value:
        parse_bind(value)
    return value


def _path(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise ValueError("it is empty; name a folder (. is the current one)")
    return value


def check_address(value: str, schemes: tuple[str, ...]) -> str:
    """``value``, a URL of one of ``schemes`` with a host and without credentials; ValueError otherwise."""
    try:
        url = urlsplit(value)
        usable = bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        raise ValueError(f"not a URL: {value!r}") from None
    if "@" in url.netloc:
        raise ValueError(f"a URL must not carry credentials ({url.scheme}://…@{url.hostname})")
    if url.scheme not in schemes or not usable or value != value.strip():
        raise ValueError(f"not a URL of the form {schemes[0]}://host: {value!r}")
    return value


def upstream_address(value: str) -> str:
    """The one spelling of a firehose's address: no default port, no capitals, no method's path behind it.

    ValueError for what no upstream can be.
    """
    url = urlsplit(check_address(value, ("wss", "ws")))
    if url.query or url.fragment or "?" in value:
        raise ValueError(f"an upstream has no query, its cursor is set otherwise: {value[:120]!r}")
    host = url.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if url.port in (None, {"wss": 443, "ws": 80}[url.scheme]) else f":{url.port}"
    path = url.path.rstrip("/").removesuffix(SUBSCRIBE).rstrip("/")
    return f"{url.scheme}://{host}{port}{path}"


def _upstream(value: str) -> str:
    upstream_address(value.removeprefix(_PDS_PREFIX))
    return value


def _upstreams_once(values: list[str]) -> list[str]:
    """Refuses the same firehose twice: under two spellings it would be read, and counted, twice."""
    known: dict[str, str] = {}
    for value in values:
        address = upstream_address(value.removeprefix(_PDS_PREFIX))
        if address in known:
            raise ValueError(f"{value!r} is the upstream {known[address]!r} once more")
        known[address] = value
    return values


def _directory(value: str) -> str:
    return check_address(value, ("https", "http"))


def parse_tier(value: str) -> tuple[str, int, float, int]:
    """Name, fetches at one time, requests a second and accounts of ``name=4/50/0``; 0 requests or accounts
    is no limit."""
    match = re.fullmatch(r"([a-z][a-z0-9_-]{0,31})=(\d{1,6})/(\d{1,6}(?:\.\d+)?)/(\d{1,12})", value)
    if match is None or int(match[2]) < 1:
        raise ValueError(f"not a tier: {value!r}; write it as name=FETCHES/REQUESTS_PER_S/ACCOUNTS")
    return match[1], int(match[2]), float(match[3]), int(match[4])


def _tier(value: str) -> str:
    parse_tier(value)
    return value


def parse_host_rule(value: str) -> tuple[str, str]:
    """Pattern and tier of ``*.example.com=name``."""
    pattern, _, tier = value.partition("=")
    if not re.fullmatch(r"[a-z0-9.*?:\[\]-]{1,253}", pattern) or not tier:
        raise ValueError(f"not a rule for hosts: {value!r}; write it as *.example.com=tier, in lower case")
    return pattern, tier


def _host_rule(value: str) -> str:
    parse_host_rule(value)
    return value


def _proxy(value: str) -> str:
    bare = urlsplit(value)
    try:
        usable = bare.scheme == "http" and bool(bare.hostname) and (bare.port or 80) > 0
    except ValueError:
        usable = False
    if not usable or bare.path.strip("/") or bare.query or value != value.strip():
        shown = f"{bare.scheme}://…" if "@" in value else repr(value)
        raise ValueError(f"not a proxy of the form http://host:port, with user:password@ if needed: {shown}")
    return value


#: How a source of the crawler is asked: for all its repositories, for those that hold a collection, or for
#: hosts, each of which is then asked for its repositories.
CRAWLER_MODES: Final = ("list_repos", "by_collection", "hosts")


def parse_crawler_source(value: str) -> tuple[str, str]:
    """Mode and origin of ``[mode::]https://host``; without a mode it is ``list_repos``."""
    mode, found, url = value.partition("::")
    if not found or "/" in mode:
        mode, url = CRAWLER_MODES[0], value
    if mode not in CRAWLER_MODES:
        raise ValueError(f"no mode of the crawler: {mode[:40]!r}; there are {', '.join(CRAWLER_MODES)}")
    bare = urlsplit(check_address(url, ("https", "http")))
    if bare.path.strip("/") or bare.query or bare.fragment or not url.isascii() or not url.isprintable():
        raise ValueError(f"not an origin of the form https://host: {url[:120]!r}")
    return mode, f"{bare.scheme}://{bare.netloc.lower()}"


def _crawler_source(value: str) -> str:
    parse_crawler_source(value)
    return value


def _crawler_sources_once(values: list[str]) -> list[str]:
    """Refuses the same source twice: it has one position, and is read once."""
    known: dict[tuple[str, str], str] = {}
    for value in values:
        mode, origin = parse_crawler_source(value)
        source = mode, origin.removesuffix(":443" if origin.startswith("https:") else ":80")
        if source in known:
            raise ValueError(f"{value!r} is the source {known[source]!r} once more")
        known[source] = value
    return values


def check_order(section: BaseModel, least: str, most: str) -> None:
    """ValueError when the first of two times of a table is longer than the second."""
    low, high = getattr(section, least), getattr(section, most)
    if low > high:
        raise ValueError(f"{least} ({low:g} s) is above {most} ({high:g} s)")


def _network(value: str) -> str:
    ip_network(value, strict=False)
    return value


def _each(check: Callable[[str], str]) -> AfterValidator:
    """Checks every item of a list; our own errors become the ValueError that pydantic expects."""

    def checked(items: list[str]) -> list[str]:
        try:
            return [check(item) for item in items]
        except SyntaxInvalid as error:
            raise ValueError(str(error)) from error

    return AfterValidator(checked)


Duration = Annotated[float, BeforeValidator(parse_duration)]
Retention = Annotated[float | None, BeforeValidator(_retention)]
Items = Annotated[list[str], BeforeValidator(_items)]
Bind = Annotated[str, BeforeValidator(_bind)]
Folder = Annotated[Path, BeforeValidator(_path)]
NsidPatterns = Annotated[Items, _each(check_nsid_pattern)]
Dids = Annotated[Items, _each(check_did)]
Upstreams = Annotated[Items, _each(_upstream), AfterValidator(_upstreams_once)]
Overrides = Annotated[Items, _each(_override)]
Directories = Annotated[Items, _each(_directory)]
Tiers = Annotated[Items, _each(_tier)]
HostRules = Annotated[Items, _each(_host_rule)]
Proxies = Annotated[Items, _each(_proxy)]
Networks = Annotated[Items, _each(_network)]
CrawlerSources = Annotated[Items, _each(_crawler_source), AfterValidator(_crawler_sources_once)]


def check_lists(tables: dict[str, Any], model: type[BaseModel], prefix: str = "") -> None:
    """A file has lists where a list belongs; the comma-separated form is the environment's."""
    for name, value in tables.items():
        field = model.model_fields.get(name)
        if field is None:
            continue
        if isinstance(value, dict) and isinstance(field.annotation, type):
            if issubclass(field.annotation, BaseModel):
                check_lists(value, field.annotation, f"{prefix}{name}.")
        elif isinstance(value, str) and field.annotation == list[str]:
            raise ConfigError(f"setting {prefix}{name}: a list belongs here: {name} = [{json.dumps(value)}]")


def describe(error: ValidationError, secrets: Collection[str]) -> str:
    """What is wrong with which settings, in one line."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        # Our own messages show the value where that helps; a secret is shown by none.
        given = "" if item["type"] == "value_error" or name in secrets else f" (got {item['input']!r})"
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting: {name}")
        elif not name:  # it is about several
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"setting {name}: {item['msg'].removeprefix('Value error, ')}{given}")
    return "; ".join(lines)
