"""Compares the index with the simulated network's ledger. Reads the store; changes nothing."""

from __future__ import annotations

from typing import Any

import orjson

from indexer.atproto.cid import dag_cbor_cid, format_cid
from indexer.atproto.dagcbor import record_to_json
from indexer.store.codecs import RepoRow, SyncState
from indexer.store.database import Database

PAGE = 5000


def behind(db: Database, ledger: dict[str, Any], *, ephemeral: bool) -> list[str]:
    """DIDs whose rev, state or account status is not the ledger's yet."""
    late = []
    for did, account in ledger["accounts"].items():
        row = db.repo(did)
        if row is None:
            if not ephemeral:
                late.append(did)
        elif (
            row.status.label != account["status"]
            or (
                account["status"] == "active" and (row.state != SyncState.SYNCED or row.rev != account["rev"])
            )
            or (account["status"] == "deleted" and db.records(did, limit=1))  # until it is confirmed
        ):
            late.append(did)
    return late


def differences(db: Database, ledger: dict[str, Any], *, ephemeral: bool) -> list[str]:
    """One line for each way in which the index is not the ledger; empty when they are equal."""
    found: list[str] = []
    for did, account in ledger["accounts"].items():
        row = db.repo(did)
        if row is None:
            if not ephemeral:
                found.append(f"{did}: not in the index")
            continue
        found += _row_differences(did, row, account)
        if not ephemeral:
            found += _record_differences(db, did, row, account)
    known = ledger["accounts"].keys()
    # What somebody asked for beside the network's accounts has no commit; it is no difference.
    found += [
        f"{did}: in the index, not in the ledger"
        for did, row in all_repos(db)
        if row.rev and did not in known
    ]
    return found


def _row_differences(did: str, row: RepoRow, account: dict[str, Any]) -> list[str]:
    found = []
    if row.status.label != account["status"]:
        found.append(f"{did}: status {row.status.label}, ledger {account['status']}")
    if account["status"] != "active":
        return found
    if row.rev != account["rev"]:
        found.append(f"{did}: rev {row.rev or '-'} ({row.state.label}), ledger {account['rev']}")
    elif format_cid(row.data) != account["data"]:
        found.append(f"{did}: data root {format_cid(row.data)}, ledger {account['data']}")
    elif format_cid(dag_cbor_cid(row.commit)) != account["commit"]:
        found.append(f"{did}: commit {format_cid(dag_cbor_cid(row.commit))}, ledger {account['commit']}")
    return found


def _record_differences(db: Database, did: str, row: RepoRow, account: dict[str, Any]) -> list[str]:
    have = {path: record.cid for path, record in db.records(did)}
    if account["status"] == "deleted":
        return [f"{did}: deleted, and still has {len(have)} records"] if have else []
    if account["status"] != "active" and row.rev != account["rev"]:
        return []  # hidden before it could be fetched: nothing is served of it
    want: dict[str, str] = account["records"]
    found = []
    for path in sorted(want.keys() | have.keys()):
        cid = have.get(path)
        text = None if cid is None else format_cid(cid)
        if text != want.get(path):
            found.append(f"{did}/{path}: {text}, ledger {want.get(path)}")
        elif cid is not None and "values" in account:
            block = db.block(did, cid)
            if block is None:
                found.append(f"{did}/{path}: its block is missing")
            elif orjson.loads(record_to_json(block)) != account["values"][path]:
                found.append(f"{did}/{path}: the value differs from the ledger's")
    return found


def all_repos(db: Database) -> list[tuple[str, RepoRow]]:
    """Every repository row, read in pages."""
    rows: list[tuple[str, RepoRow]] = []
    after = ""
    while page := db.repos(after=after, limit=PAGE):
        rows += page
        after = page[-1][0]
    return rows
