"""Every mutant still applies; `python -m tests.mutants.run` shows that each is noticed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutants import run
from tests.mutants.run import Mutant, NotApplied, mutants, mutated, verdict
from tests.paths import ROOT

#: Likely bugs that one of them must be.
NAMED = {
    "cursor-saved-before-data", "floor-off-by-one", "delete-stored-as-update", "signature-check-skipped",
    "refcount-not-released",
}  # fmt: skip


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_it_applies_and_is_valid_python(mutant: Mutant) -> None:
    text = mutated(mutant, (ROOT / mutant.file).read_text())
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    assert (ROOT / mutant.killer).is_file()
    assert mutant.why


def test_names_are_unique_and_the_likeliest_bugs_are_among_them() -> None:
    names = [mutant.name for mutant in mutants()]
    assert len(names) == len(set(names))
    assert set(names) >= NAMED
    assert sum(mutant.file.startswith("indexer/store/") for mutant in mutants()) >= 12


def test_a_text_that_is_not_found_exactly_once_is_refused() -> None:
    mutant = mutants()[0]
    for text in ("", mutant.old * 2):
        with pytest.raises(NotApplied, match=mutant.name):
            mutated(mutant, text)


@pytest.mark.slow
def test_killed_or_survived_is_what_the_killer_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.py").write_text("ONE = 1\n")
    (tmp_path / "test_one.py").write_text("from one import ONE\n\n\ndef test_sign():\n    assert ONE > 0\n")
    for new, killed in (("-1", True), ("2", False)):
        assert verdict(tmp_path, Mutant("m", "one.py", "1", new, "test_one.py", "")) is killed
    assert (tmp_path / "one.py").read_text() == "ONE = 1\n"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["killed", "SURVIVED"]
    assert lines[0].endswith("test_one.py test_sign")


@pytest.mark.slow
def test_many_are_judged_at_a_time_each_in_a_tree_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts of one size, written within a second: no bytecode of another is taken for a mutant's."""
    (tmp_path / "one.py").write_text("ONE = 1\n")
    for name, wanted in (("one", 1), ("two", 2)):
        (tmp_path / f"test_{name}.py").write_text(
            f"import one\n\n\ndef test():\n    assert one.ONE <= {wanted}\n"
        )
    monkeypatch.setattr(run, "ROOT", tmp_path)
    chosen = [
        Mutant(f"{name}-{new}", "one.py", "1", new, f"test_{name}.py", "")
        for new in ("2", "3", "0") for name in ("one", "two")
    ]  # fmt: skip
    stale = Mutant("stale", "one.py", "7", "8", "test_one.py", "")
    assert run.judged([*chosen, stale], 2) == 4
    words = {line.split()[1]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    survivors = {name for name, word in words.items() if word == "SURVIVED"}
    assert survivors == {"two-2", "one-0", "two-0"}
    assert words.pop("stale:") == "STALE"
    assert words.keys() == {mutant.name for mutant in chosen}
