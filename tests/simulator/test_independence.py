from __future__ import annotations

import ast

from tests.paths import ROOT


def test_the_simulator_shares_no_code_with_what_it_tests() -> None:
    modules = sorted((ROOT / "indexer" / "simulator").rglob("*.py"))
    imported = set()
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, module
                imported.add(node.module or "")
            elif isinstance(node, ast.Import):
                imported.update(name.name for name in node.names)
    ours = {name for name in imported if name.split(".")[0] == "indexer"}
    assert ours
    assert all(f"{name}.".startswith("indexer.simulator.") for name in ours)
    assert not imported & {"libipld", "cbor2"}  # the indexer's own codecs
