"""docs/sync.md names every reason that the code gives to a message, and no other, each with its tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from indexer.errors import FrameError
from indexer.ingest.machine import LABELS
from indexer.ingest.verify import COMMIT, SYNC
from indexer.store.codecs import SyncState
from tests.ingest.test_verify import REFUSED
from tests.paths import ROOT

PAGE = (ROOT / "docs" / "sync.md").read_text()
FILES = ["atproto/frames.py"]
_PARTS = "verify machine apply answers drain newcomers pipeline strangers suspects"
FILES += [f"ingest/{name}.py" for name in _PARTS.split()]
#: Call → where the reason stands among its arguments.
CALLS = {
    "_reject": 1, "_desync": 1, "Verdict": 2, "Decision": 1, "_unproven": 1, "desynchronized": 1,
    "Result": 1, "_dropped": 4, "_refuse": 2,
}  # fmt: skip
#: Reasons that are read from a value: that of row 0, the state in which a frame is dropped, the kind applied.
READ = {FrameError.reason, SyncState.PENDING.label, SyncState.DESYNCHRONIZED.label, COMMIT, SYNC}
_COUNTED = re.compile(rf"/(?:{'|'.join(LABELS)}|note)/([a-z_]+)$")


def _texts(node: ast.AST) -> Iterator[str]:
    """The words that an expression may give, those within calls and comparisons left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*_texts(node.body), *_texts(node.orelse))
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value)


def _given(path: Path) -> Iterator[str]:
    """Every reason that a module gives."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name(id=name), args=args) if name in CALLS and len(args) > CALLS[name]:
                yield from _texts(args[CALLS[name]])
            case ast.Assign(targets=[ast.Name(id="reason")], value=value):
                yield from _texts(value)
            case ast.AnnAssign(target=ast.Name(id="WORKER_DIED"), value=ast.expr() as value):
                yield from _texts(value)
            case ast.Tuple(elts=[ast.Constant(value=int()), ast.Constant(value=str(reason))]):
                yield reason
            case ast.JoinedStr(values=[*_, ast.Constant(value=str(end))]):
                yield from _COUNTED.findall(end)


def _rows() -> list[list[str]]:
    """The cells of the tables' rows."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ") and "`tests/" in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_reason_is_in_the_page_and_the_reverse() -> None:
    files = {ROOT / "indexer" / name for name in FILES}
    given = {reason for path in files for reason in _given(path) if re.fullmatch("[a-z_]+", reason)} | READ
    named = {reason for row in _rows() for reason in re.findall(r"^`([a-z_]+)`$", row[3])}
    assert len(given) > 30
    assert named == given


def test_the_rows_of_the_table_of_checks_are_those_of_the_code() -> None:
    wanted = {(row, outcome.name.lower(), reason) for row, outcome, reason, _ in REFUSED}
    listed = {(row[0], row[2].removeprefix("buffer, then "), row[3].strip("`")) for row in _rows()}
    for number, outcome, reason in wanted:
        # A frame with more operations or blocks than allowed is refused where its fields are.
        rows = {"1", "2"} if number == 1 else {str(number)}
        assert any((row, outcome, reason) in listed for row in rows), (number, outcome, reason)


def test_every_row_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 50
    for file, function in named:
        assert (ROOT / file).is_file(), file
        assert not function or f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"
