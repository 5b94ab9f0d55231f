"""Comparison of revs after a possible loss: what an upstream lists against what we hold.

Owns the durable task of each upstream (a row of `cursors`, moved on in the batch of each page's findings, so
that a kill costs nothing), its pace and its end. A followed repository that the upstream lists with a rev
newer than ours gets `Work.COMPARE_REV`: its own host is asked, and it is fetched where that is true.
Revs from after the pass began come by the stream, whose chain tells of a gap by itself. Event loop only.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import orjson
import structlog
from yarl import URL

from indexer.atproto.syntax import is_tid, tid_from_micros
from indexer.atproto.types import Did, Micros, Rev
from indexer.errors import FetchError, FetchRefused, FetchTransient, StoreError
from indexer.ingest.apply import Applier
from indexer.ingest.source import SUBSCRIBE
from indexer.ingest.tools import IngestTools
from indexer.store.codecs import RepoRow, SyncState, Work, after_prefix
from indexer.store.keyspaces import CURSORS, REPOS
from indexer.store.transaction import Transaction

log = structlog.get_logger()

LIST_REPOS: Final = "/xrpc/com.atproto.sync.listRepos"
#: Rows of `cursors`: this + the upstream's name.
ROWS: Final = "compare_revs/"
PAGE: Final = 1000
_MAX_PAGE_BYTES: Final = 4 << 20
_MAX_CURSOR: Final = 2048
#: First and longest wait after a failure, in seconds.
_RETRY_S: Final = (2.0, 600.0)
_IDLE_S: Final = 60.0
_LAST_CLOCK: Final = 1023
#: Answers that will not change: the host does not list its repositories.
_NO_LIST: Final = frozenset((400, 404, 405, 501))
#: What may come of a pass, for the counters ``compare_revs/<outcome>``.
OUTCOMES: Final = ("scheduled", "done", "behind", "unsupported", "malformed", "page_failed")


class Task(NamedTuple):
    """What is to be compared with one upstream. ``again``: a further alarm came in meanwhile."""

    cursor: str
    started_us: Micros
    reason: str
    again: bool = False
    listed: int = 0
    behind: int = 0
    pages: int = 0


class Page(NamedTuple):
    """One answer to listRepos: the newest rev of each active repository; ``cursor`` "" at the end."""

    revs: Mapping[Did, Rev]
    cursor: str
    listed: int


def schedule(tx: Transaction, upstream: str, reason: str) -> None:
    """Has the revs of ``upstream`` compared; one pass that is under way ends first."""
    task = _task(tx.position(ROWS + upstream))
    if task is None:
        _count(tx, "scheduled")
        task = Task("", tx.now_us, reason)
    else:
        task = task._replace(again=True)
    tx.set_cursor(ROWS + upstream, list(task))


def cancel(tx: Transaction, upstream: str) -> None:
    """The upstream is no longer followed."""
    tx.set_cursor(ROWS + upstream, None)


def list_url(url: str, cursor: str) -> str:
    """Where the upstream at ``url`` (``wss://…``) lists its repositories, after ``cursor``."""
    base = URL(url)
    path = base.path.removesuffix(SUBSCRIBE).rstrip("/") + LIST_REPOS
    origin = base.with_scheme("http" if base.scheme == "ws" else "https")
    query = {"limit": str(PAGE)} | ({"cursor": cursor} if cursor else {})
    return str(origin.with_path(path).with_query(query))


def read_page(body: bytes) -> Page:
    """Raises ValueError for what is no answer to listRepos; entries that make no sense are passed over."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    repos = answer.get("repos") if isinstance(answer, dict) else None
    if not isinstance(repos, list) or len(repos) > 2 * PAGE:
        raise ValueError("no list of repositories")
    cursor = answer.get("cursor") or ""
    if not isinstance(cursor, str) or len(cursor) > _MAX_CURSOR:
        raise ValueError("a cursor that is none")
    revs: dict[Did, Rev] = {}
    for item in repos:
        if not isinstance(item, dict) or item.get("active") is False:
            continue
        did, rev = item.get("did"), item.get("rev")
        if isinstance(did, str) and did.startswith("did:") and isinstance(rev, str) and is_tid(rev):
            revs[did] = rev
    return Page(revs, cursor, len(repos))


class RevComparison:
    """Works off the tasks, page by page, in turns. ``urls`` are the followed upstreams by name."""

    def __init__(self, tools: IngestTools, applier: Applier, urls: Mapping[str, str]) -> None:
        self._tools = tools
        self._applier = applier
        self._urls = urls
        self._pace_s = 1.0 / tools.settings.audit.rev_pages_per_s
        self._delay_s = tools.settings.audit.rev_delay
        self._max_pages = tools.settings.audit.rev_max_pages
        self._not_before: dict[str, float] = {}  # loop time
        self._failures: Counter[str] = Counter()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """A task was scheduled."""
        self._woken.set()

    def status(self, upstream: str) -> dict[str, Any] | None:
        """The task of an upstream, for people; None when there is none."""
        task = _task(self._tools.db.get(CURSORS, ROWS + upstream))
        if task is None:
            return None
        return {"reason": task.reason, "since_us": task.started_us, "listed": task.listed,
                "behind": task.behind, "failures": self._failures[upstream]}  # fmt: skip

    async def run(self) -> None:
        """Until cancelled; a failure of our own store ends it and the daemon with it."""
        while True:
            self._woken.clear()
            wait = _IDLE_S
            for name in self._pending():
                left = self._wait_s(name)
                if left <= 0:
                    left = await self._turn(name)
                wait = min(wait, left)
            try:
                async with asyncio.timeout(wait):
                    await self._woken.wait()
            except TimeoutError:
                pass

    def _wait_s(self, name: str) -> float:
        """Seconds until the upstream may be asked; first it is to send what it retains."""
        left = self._not_before.get(name, 0.0) - asyncio.get_running_loop().time()
        task = _task(self._tools.db.get(CURSORS, ROWS + name))
        if task is None or task.listed:
            return left
        return max(left, task.started_us / 1e6 + self._delay_s - self._tools.clock())

    def _pending(self) -> list[str]:
        prefix = ROWS.encode()
        names = [
            name.removeprefix(ROWS) for name, _ in self._tools.db.scan(CURSORS, prefix, after_prefix(prefix))
        ]
        return [name for name in names if name in self._urls]

    async def _turn(self, name: str) -> float:
        """One page of one upstream; seconds to wait."""
        try:
            await self._page(name)
        except FetchRefused as error:
            await self._end(name, "unsupported" if error.status in _NO_LIST else "malformed", str(error))
            return 0.0
        except ValueError as error:
            await self._end(name, "malformed", str(error))
            return 0.0
        except StoreError:
            raise
        except FetchError as error:
            return await self._failed(name, error)
        except Exception as error:  # a fault of ours; the task stands in the store and would end each start
            log.error("compare_revs_failed", upstream=name, exc_info=error)
            return await self._failed(name, error)
        self._failures.pop(name, None)
        self._not_before[name] = asyncio.get_running_loop().time() + self._pace_s
        return self._pace_s

    async def _failed(self, name: str, error: Exception) -> float:
        first, longest = _RETRY_S
        wait = min(longest, first * 2.0 ** min(self._failures[name], 16))
        wait = max(wait, min(longest, getattr(error, "retry_after", None) or 0.0))
        self._failures[name] += 1
        self._not_before[name] = asyncio.get_running_loop().time() + wait
        log.info("compare_revs_postponed", upstream=name, reason=str(error)[:300], retry_in_s=round(wait, 1))
        await self._tools.writer.run("compare_revs", lambda tx: _count(tx, "page_failed"))
        return wait

    async def _page(self, name: str) -> None:
        task = _task(self._tools.db.get(CURSORS, ROWS + name))
        if task is None:
            return
        response = await self._tools.http.get(
            list_url(self._urls[name], task.cursor), max_bytes=_MAX_PAGE_BYTES
        )
        if response.status == 429 or (response.status >= 500 and response.status != 501):
            raise FetchTransient(f"listRepos answered {response.status}", retry_after=response.retry_after)
        if response.status != 200:
            raise FetchRefused(f"listRepos answered {response.status}", status=response.status)
        page = read_page(response.body)
        if page.cursor and page.cursor == task.cursor:
            raise ValueError("the same page again and again")
        if task.pages >= self._max_pages:
            raise ValueError(f"more than {self._max_pages} pages")
        behind = self._behind(page, task)
        done = await self._tools.writer.run(
            "compare_revs", lambda tx: self._found(tx, name, task, page, behind)
        )
        if done is not None:
            log.info(
                "compare_revs_done", upstream=name, reason=done.reason, listed=done.listed, behind=done.behind
            )

    def _behind(self, page: Page, task: Task) -> list[Did]:
        """Followed repositories of the page whose listed rev is newer than ours."""
        margin = int(self._tools.settings.ingest.max_future * 1_000_000)
        newest = tid_from_micros(task.started_us + margin, _LAST_CLOCK)
        dids = [did for did, rev in page.revs.items() if rev <= newest]
        rows = self._tools.db.multi_get(REPOS, dids)
        return [
            did
            for did, row in zip(dids, rows, strict=True)
            if row is not None and is_behind(row, page.revs[did])
        ]

    def _found(self, tx: Transaction, name: str, task: Task, page: Page, behind: list[Did]) -> Task | None:
        """The page's findings and the task's new position, in one batch; the task when it is done."""
        now = _task(tx.position(ROWS + name))
        if now is None or (now.cursor, now.started_us) != (task.cursor, task.started_us):
            return None  # cancelled, or begun anew
        marked = sum(self._mark(tx, did, page.revs[did]) for did in behind)
        if marked:
            _count(tx, "behind", marked)
        now = now._replace(
            cursor=page.cursor,
            listed=now.listed + page.listed,
            behind=now.behind + marked,
            pages=now.pages + 1,
        )
        if page.cursor:
            tx.set_cursor(ROWS + name, list(now))
            return None
        _count(tx, "done")
        _finish(tx, name, now)
        return now

    def _mark(self, tx: Transaction, did: Did, rev: Rev) -> bool:
        row = tx.repo(did)
        if row is None or not is_behind(row, rev):
            return False
        self._applier.store(tx, did, row, row._replace(work=row.work | Work.COMPARE_REV))
        return True

    async def _end(self, name: str, outcome: str, why: str) -> None:
        """A pass that the host makes impossible."""
        log.warning("compare_revs_ended", upstream=name, outcome=outcome, reason=why[:300])

        def step(tx: Transaction) -> None:
            task = _task(tx.position(ROWS + name))
            if task is not None:
                _count(tx, outcome)
                _finish(tx, name, task._replace(again=task.again and outcome != "unsupported"))

        await self._tools.writer.run("compare_revs", step)


def is_behind(row: RepoRow, rev: Rev) -> bool:
    """Whether the listed rev makes it worth asking the repository's host."""
    if not row.tracked or not row.status.active or rev <= row.rev:
        return False
    return row.state is SyncState.SYNCED and not row.work & Work.COMPARE_REV


def _finish(tx: Transaction, name: str, task: Task) -> None:
    """The pass is over: the next begins where alarms came in meanwhile."""
    again = list(Task("", tx.now_us, task.reason)) if task.again else None
    tx.set_cursor(ROWS + name, again)


def _task(row: Any) -> Task | None:
    # Stored ones of before pages were counted have none.
    whole = isinstance(row, list) and len(Task._fields) - 1 <= len(row) <= len(Task._fields)
    return Task(*row) if whole else None


def _count(tx: Transaction, outcome: str, number: int = 1) -> None:
    tx.add_count(ROWS + outcome, number)
