"""Dependencies between the parts point one way; see the table in docs/architecture.md."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

#: What everything may use: errors, settings, names of values, and plain helpers above no part.
_BASE = {"errors", "config", "logs"}
#: part → the other parts that it may import. A part is a folder or a module directly under indexer/.
ALLOWED = {
    "errors": set[str](),
    "setting_values": {"errors", "atproto"},
    "setting_groups": {"setting_values"},
    "setting_servers": {"setting_groups", "setting_values"},
    "config": {"errors", "setting_groups", "setting_servers", "setting_values"},
    "logs": {"config"},
    "pool": _BASE | {"memory"},
    "memory": set[str](),
    "atproto": {"errors"},
    "simulator": set[str](),
    "repo": {"errors", "atproto"},
    "cas": {"errors", "atproto"},
    "store": _BASE | {"atproto", "repo", "cas"},
    "identity": _BASE | {"atproto"},
    "ingest": _BASE | {"atproto", "repo", "store", "identity", "pool"},
    "backfill": _BASE | {"atproto", "repo", "store", "identity", "pool", "ingest"},
    "crawl": _BASE | {"atproto", "store", "identity", "ingest", "backfill"},
    "serve": _BASE | {"atproto", "repo", "store", "identity", "pool", "ingest", "backfill", "crawl"},
    "daemon": _BASE
    | {"memory", "cas", "atproto", "repo", "store", "identity", "pool"}
    | {"ingest", "backfill", "crawl", "serve"},
}
#: The top: the command line may import everything.
TOP = {"cli", "commands", "__main__", "__init__"}


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def _imports(path: Path) -> frozenset[str]:
    """Every module that a file imports, at any depth, with `from a import b` given as a.b."""
    found: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                assert path.name == "__init__.py", f"{path}: imports are absolute"
    return frozenset(found)


def _part(path: Path) -> str:
    return path.relative_to(ROOT / "indexer").parts[0].removesuffix(".py")


def _sources() -> list[Path]:
    return sorted((ROOT / "indexer").rglob("*.py"))


def _edges() -> dict[str, set[str]]:
    """part → the parts that it really imports."""
    edges: dict[str, set[str]] = {}
    for path in _sources():
        used = {
            name.split(".")[1]
            for name in _imports(path)
            if name.startswith("indexer.") and not name.startswith("indexer.__version__")
        }
        edges.setdefault(_part(path), set()).update(used - {_part(path)})
    return edges


def test_parts_import_only_what_lies_below_them() -> None:
    wrong = {
        part: sorted(used - ALLOWED[part])
        for part, used in _edges().items()
        if part not in TOP and used - ALLOWED[part]
    }
    assert not wrong


def test_the_allowed_dependencies_have_no_cycle() -> None:
    settled: set[str] = set()
    while len(settled) < len(ALLOWED):
        free = {part for part, below in ALLOWED.items() if below <= settled} - settled
        assert free, f"a cycle among {sorted(set(ALLOWED) - settled)}"
        settled |= free


def test_every_part_has_a_rule_and_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for part in _edges():
        assert part in ALLOWED or part in TOP, f"{part} has no rule in this file"
        assert part == "__init__" or f"`{part}`" in page, f"{part} is not in docs/architecture.md"


def test_migrations_know_only_their_framework() -> None:
    used = {
        name
        for path in (ROOT / "migrations").glob("*.py")
        for name in _imports(path)
        if name.startswith("indexer.")
    }
    allowed = ("indexer.store.migration.", "indexer.store.raw.", "indexer.errors.")
    assert not [name for name in used if not name.startswith(allowed)]


@pytest.mark.parametrize(
    ("module", "importers"),
    [
        ("rocksdict", {"store"}),
        ("indexer.simulator", {"commands", "simulator"}),
        ("indexer.daemon", {"commands", "cli", "__init__"}),
        ("indexer.commands", {"commands", "cli"}),
        ("click", {"commands", "cli"}),
    ],
)
def test_only_these_import(module: str, importers: set[str]) -> None:
    found = {
        _part(path)
        for path in _sources()
        if any(name == module or name.startswith(module + ".") for name in _imports(path))
    }
    assert found <= importers


def test_the_protocol_functions_do_no_input_output() -> None:
    forbidden = {"asyncio", "socket", "aiohttp", "time", "os", "threading", "random", "logging", "structlog"}
    for path in (ROOT / "indexer" / "atproto").rglob("*.py"):
        assert not forbidden & {name.split(".")[0] for name in _imports(path)}, path


def test_every_module_opens_with_its_charter() -> None:
    bare = [
        str(path.relative_to(ROOT))
        for folder in ("indexer", "bench")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.read_text().strip() and not ast.get_docstring(_parsed(path))
    ]
    assert not bare


def test_modules_and_functions_stay_small() -> None:
    long = []
    for path in _sources():
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(_parsed(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno
                if length > 80:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines")
    assert not long
