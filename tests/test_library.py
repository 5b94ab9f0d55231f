"""The package's front: its names, what importing it costs, and the examples of docs/library.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import indexer
from indexer.repo.walker import index_repo
from tests.paths import DATA, ROOT
from tests.repo.archives import bodies, pieces, repository
from tests.repo.repos import sample

PAGE = (ROOT / "docs" / "library.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def names() -> dict[str, Any]:
    """What the examples define."""
    found: dict[str, Any] = {"__name__": "examples"}
    for example in EXAMPLES:
        exec(compile(example, "docs/library.md", "exec"), found)
    return found


def test_every_name_is_there_and_an_unknown_one_is_refused() -> None:
    assert [name for name in indexer.__all__ if getattr(indexer, name, None) is None] == []
    assert set(indexer.__all__) == set(indexer._HOMES)
    assert set(indexer.__all__) <= set(dir(indexer))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        indexer.Nothing  # noqa: B018


def test_importing_the_package_loads_none_of_its_parts() -> None:
    loaded = "[name for name in sys.modules if name.startswith(('indexer.', 'rocksdict'))]"
    script = f"import sys, indexer; print({loaded})"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_there_are_as_many_examples_as_are_run_here() -> None:
    assert len(EXAMPLES) == 4


async def test_the_sum_of_record_sizes_in_memory_and_on_disk(tmp_path: Path) -> None:
    made, found = repository(bodies(3000, size=250)), names()
    expected = sum(map(len, made.records.values()))
    assert await found["total_in_memory"](pieces(made.car())) == expected
    builder = indexer.DriverBuilder(1, found["only_the_size"], streaming=False)
    loaded = await builder.load_car(made.car())
    assert isinstance(loaded, indexer.Driver.Disk), "the example needs its disk"
    await loaded.need_disk.drop()
    for car in (made.car(), sample("ten").car):
        total = await found["total_on_disk"](pieces(car, 50_000), tmp_path / "spill")
        assert total == (expected if car == made.car() else await found["total_in_memory"](car))
        assert not (tmp_path / "spill").exists()


def test_the_sum_in_parallel(tmp_path: Path) -> None:
    # Worker processes import what they run, so the example becomes a module.
    (tmp_path / "example.py").write_text(EXAMPLES[2])
    files = [str(DATA / "repos" / f"{name}.car") for name in ("ten", "kilo")]
    script = f"import example\nif __name__ == '__main__': print(example.total_in_parallel({files!r}))"
    (tmp_path / "run.py").write_text(script)
    out = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    rows = [row for name in ("ten", "kilo") for row in index_repo(sample(name).car).records]
    expected = sum(end - start for _path, _cid, start, end in rows)
    assert int(out.stdout) == expected


async def test_asking_for_a_part() -> None:
    _, car, truth = sample("kilo")
    posts, profile = await names()["posts_and_profile"](pieces(car))
    assert posts == sum(1 for path in truth["records"] if path.startswith("app.bsky.feed.post/"))
    assert profile == ("app.bsky.actor.profile/self" in truth["records"])
