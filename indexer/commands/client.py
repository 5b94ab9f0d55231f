"""`indexer get` and `stream`, and what every client of a running daemon's HTTP interfaces shares.

Owns their options, output and reconnecting. What strangers wrote reaches the terminal without control
characters. Everything goes through the public and the management listener;
where they are comes from the options, else from the settings (file and environment) that the daemon has.
A daemon that is not there is one line and exit code 1.
"""

from __future__ import annotations

import asyncio
import functools
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import aiohttp
import click

from indexer.atproto.syntax import check_did, check_nsid_pattern, parse_at_uri
from indexer.commands.paths import NamedPath
from indexer.config import Settings, load, parse_bind
from indexer.errors import FetchError, FetchRefused, FetchTransient, RequestError
from indexer.setting_values import check_address

T = TypeVar("T")

NDJSON = "application/x-ndjson"
_TIMEOUT_S = 60.0
_CONNECT_S = 5.0
#: First and longest wait before the stream is opened again, in seconds.
_RETRY_S = (0.5, 15.0)
_MAX_MESSAGE = 16 << 20
#: C1 and DEL, which JSON leaves as they are and terminals obey, and halves of surrogate pairs; C0 too.
_CONTROLS = re.compile("[\x7f-\x9f\ud800-\udfff]")
_ALL_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def safe_json(text: str) -> str:
    """JSON text of the same value, without characters that a terminal would obey."""
    return _CONTROLS.sub(_escaped, text)


def safe_text(text: object) -> str:
    """What a person is shown of somebody else's text: one line, control characters escaped."""
    return _ALL_CONTROLS.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


class Daemon:
    """The two base URLs and the token of a running daemon, and requests to it."""

    def __init__(self, public: str, management: str, token: str) -> None:
        self.public = public.rstrip("/")
        self.management = management.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    async def query(self, method: str, **params: str) -> Any:
        """An XRPC query's JSON answer."""
        async with self._call("GET", f"{self.public}/xrpc/{method}?{urlencode(params)}") as response:
            return await response.json()

    async def health(self) -> Any:
        """The daemon's summary of itself."""
        async with self._call("GET", f"{self.public}/health") as response:
            return await response.json()

    async def stats(self) -> Any:
        """Totals, rates and the state of every part."""
        async with self._call("GET", f"{self.public}/stats") as response:
            return await response.json()

    async def manage(self, method: str, path: str, body: object = None, *, patient: bool = False) -> Any:
        """A management request's JSON answer; ``patient``: one that may take as long as it needs."""
        url = f"{self.management}{path}"
        wait = None if patient else _TIMEOUT_S
        async with self._call(method, url, wait, headers=self._headers, json=body) as response:
            return await response.json()

    async def lines(self, path: str) -> AsyncGenerator[dict[str, Any]]:
        """The objects of an NDJSON answer of the management API."""
        headers = {**self._headers, "Accept": NDJSON}
        async with self._call("GET", f"{self.management}{path}", headers=headers) as response:
            async for line in response.content:
                yield json.loads(line)

    @asynccontextmanager
    async def content(self, path: str) -> AsyncIterator[aiohttp.StreamReader]:
        """The body of a management answer, to be read piece by piece; a cut one raises."""
        async with self._call("GET", f"{self.management}{path}", headers=self._headers) as response:
            yield response.content

    @asynccontextmanager
    async def _call(
        self, method: str, url: str, wait: float | None = _TIMEOUT_S, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=wait)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.request(method, url, **options) as response,
            ):
                if response.status >= 400:
                    raise await _refusal(response)
                yield response
        except aiohttp.ClientPayloadError as error:
            raise FetchTransient("the daemon broke its answer off; its log tells why") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise FetchTransient(_unreachable(url, error)) from error
        except ValueError as error:
            raise FetchError(f"the daemon's answer is not what was expected: {error}") from error


async def _refusal(response: aiohttp.ClientResponse) -> FetchRefused:
    try:
        answer = json.loads(await response.read())
        name, message = str(answer["error"]), str(answer.get("message", ""))
    except (ValueError, KeyError, TypeError):
        name, message = "", f"HTTP {response.status}"
    text = safe_text(f"{name}: {message}" if name else message)
    return FetchRefused(text, status=response.status, name=name)


def _unreachable(url: str, error: BaseException) -> str:
    base = "/".join(url.split("/")[:3])
    why = str(error) or type(error).__name__
    hint = "start it with `indexer run`, or name its --url and --management-url"
    return f"no daemon answers at {base} ({why}); {hint}"


def with_daemon(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that say where the daemon is; the command gets it as ``daemon``."""

    @functools.wraps(command)
    def wrapper(
        url: str | None, management_url: str | None, token: str | None, config: Path | None, **rest: Any
    ) -> None:
        command(daemon=daemon_of(load(config), url, management_url, token), **rest)

    path = NamedPath(dir_okay=False)
    for option in (
        click.option("--config", type=path, help="Settings file (TOML)."),
        click.option("--token", help="Management token  [default: the setting management.token]"),
        click.option(
            "--management-url",
            callback=checked_url,
            help="Management listener  [default: from management.bind]",
        ),
        click.option("--url", callback=checked_url, help="Public listener  [default: from public.bind]"),
    ):
        wrapper = option(wrapper)
    return wrapper


def checked_url(_context: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    """An option's address; raises `click.BadParameter`."""
    try:
        return value if value is None else check_address(value, ("http", "https"))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def daemon_of(settings: Settings, url: str | None, management_url: str | None, token: str | None) -> Daemon:
    """The daemon of these settings, where an option does not say otherwise."""
    return Daemon(
        url or _url_of(settings.public.bind),
        management_url or _url_of(settings.management.bind),
        settings.management.token if token is None else token,
    )


def _url_of(bind: str) -> str:
    host, port = parse_bind(bind)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


json_option = click.option("--json", "raw", is_flag=True, help="JSON.")


def say(answer: Mapping[str, Any], raw: bool, line: str) -> None:
    """One object of an answer: as it is, or the line that a person reads of it."""
    click.echo(safe_json(json.dumps(answer)) if raw else safe_text(line))


def run_client(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` until it is done or the terminal has enough of it."""
    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


# --- get --------------------------------------------------------------------------------------------------


@click.command()
@click.argument("uri")
@click.option("--json", "compact", is_flag=True, help="One line of JSON.")
@with_daemon
def get(daemon: Daemon, uri: str, compact: bool) -> None:
    """Print the record at URI (at://did-or-handle/collection/rkey)."""
    run_client(_get(daemon, uri, compact))


async def _get(daemon: Daemon, uri: str, compact: bool) -> None:
    parts = parse_at_uri(uri)
    if not parts.collection or not parts.rkey:
        raise RequestError(f"{uri} names no record: at://did-or-handle/collection/rkey is wanted")
    answer = await daemon.query(
        "com.atproto.repo.getRecord", repo=parts.authority, collection=parts.collection, rkey=parts.rkey
    )
    click.echo(safe_json(json.dumps(answer, ensure_ascii=False, indent=None if compact else 2)))


# --- stream -----------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--cursor", type=click.IntRange(min=0), help="First event id wanted; 0 is all.  [default: the head]"
)
@click.option(
    "--collection", "collections", multiple=True, help="Only records of this collection, or ns.*; repeatable."
)
@click.option("--did", "dids", multiple=True, help="Only events of this DID; repeatable.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many events.")
@click.option("--json", "raw", is_flag=True, help="NDJSON, notices included.")
@with_daemon
def stream(
    daemon: Daemon,
    cursor: int | None,
    collections: tuple[str, ...],
    dids: tuple[str, ...],
    limit: int | None,
    raw: bool,
) -> None:
    """Print the event stream until interrupted, reconnecting where it was."""

    async def main() -> None:
        patterns = [check_nsid_pattern(item) for item in collections]
        wanted = [check_did(item) for item in dids]
        head = (await daemon.health())["head"]
        tail = Tail(daemon.public, patterns, wanted, head if cursor is None else cursor)
        left = limit

        def take(text: str, message: Mapping[str, Any]) -> bool:
            nonlocal left
            is_event = message["type"] != "info"
            if raw:
                click.echo(safe_json(text))
            else:
                click.echo(_shown(message), err=not is_event)
            if left is not None and is_event:
                left -= 1
            return left == 0

        await tail.follow(take)

    run_client(main())


class Tail:
    """A stream that is opened again where it was, for as long as it takes."""

    def __init__(self, base: str, collections: list[str], dids: list[str], cursor: int) -> None:
        self._base = base.replace("http", "ws", 1)
        self._filters = [("wantedCollections", item) for item in collections]
        self._filters += [("wantedDids", item) for item in dids]
        self._cursor = cursor

    async def follow(self, take: Callable[[str, Mapping[str, Any]], bool]) -> None:
        """Hands every message, as text and parsed, to ``take`` until it returns true."""
        wait, longest = _RETRY_S
        while True:
            before = self._cursor
            try:
                if await self._session(take):
                    return
                why = "the server closed the stream"
            except aiohttp.WSServerHandshakeError as error:
                if error.status < 500 and error.status != 429:
                    refusal = f"the daemon refused the stream: HTTP {error.status}"
                    raise FetchRefused(refusal, status=error.status) from error
                why = f"the daemon is busy: HTTP {error.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                why = str(error) or type(error).__name__
            click.echo(f"{why}; connecting again", err=True)
            wait = _RETRY_S[0] if self._cursor != before else min(wait * 2, longest)
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))

    async def _session(self, take: Callable[[str, Mapping[str, Any]], bool]) -> bool:
        """One connection; true when ``take`` has enough, false when the server closed."""
        url = f"{self._base}/stream?{urlencode([*self._filters, ('cursor', str(self._cursor))])}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.ws_connect(url, max_msg_size=_MAX_MESSAGE) as socket,
        ):
            async for frame in socket:
                if frame.type is not aiohttp.WSMsgType.TEXT:
                    return False
                message = json.loads(frame.data)
                if message["type"] == "error":
                    refusal = f"{message['name']}: {message['message']}"
                    raise FetchRefused(refusal, status=400, name=message["name"])
                # A notice's id is where the stream goes on, an event's is the event's own.
                self._cursor = message["id"] if message["type"] == "info" else message["id"] + 1
                if take(frame.data, message):
                    return True
        return False


def _shown(message: Mapping[str, Any]) -> str:
    """One line for a person."""
    kind = message["type"]
    body = message.get(kind, {})
    if kind == "record":
        mark = "live" if body["live"] else "back"
        text = json.dumps(body.get("record"), ensure_ascii=False) if "record" in body else ""
        return (
            f"{message['id']:>10} {mark} {body['action']:<6} "
            f"at://{body['did']}/{body['collection']}/{body['rkey']} {safe_json(text)}"[:240].rstrip()
        )
    if kind == "info":
        return f"-- {message['name']}: goes on at {message['id']}"
    details = " ".join(f"{key}={value}" for key, value in body.items() if key != "did")
    return f"{message['id']:>10} {kind} {body.get('did', '')} {safe_text(details)}"
