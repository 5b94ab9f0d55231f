"""`indexer.migrations` is there from a plain checkout, an editable install and a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.paths import ROOT

_SHOW = "import indexer.migrations as m; print(m.__file__, [step.to for step in m.STEPS])"


def _run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_package_is_declared() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in (ROOT / "indexer").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(declared) == found | {"indexer.migrations"}
    assert declared == sorted(declared)


def test_from_a_plain_checkout(tmp_path: Path) -> None:
    shown = _run(sys.executable, "-c", _SHOW, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert shown.stdout.split()[0] == str(ROOT / "migrations" / "__init__.py"), shown.stderr


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees this one's packages and has the build tools that pyproject.toml asks for."""
    folder = tmp_path_factory.mktemp("builder")
    venv.create(folder, with_pip=True, system_site_packages=False)
    python = folder / "bin" / "python"
    purelib = next((folder / "lib").glob("python*")) / "site-packages"
    (purelib / "outer.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    tools = _run(python, "-m", "pip", "install", "--quiet", "--ignore-installed", *asked, "wheel", cwd=folder)
    if tools.returncode:
        pytest.skip(f"no package index gives the build tools: {tools.stderr.strip()[-200:]}")
    return python


def _copy(target: Path) -> Path:
    """What is built from, apart, so that builds leave nothing in the checkout."""
    target.mkdir()
    for name in ("indexer", "migrations"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("LICENSE-*")):
        shutil.copy(path, target)
    return target


@pytest.mark.slow
@pytest.mark.limit(240)
def test_from_a_wheel(builder: Path, tmp_path: Path) -> None:
    source = _copy(tmp_path / "source")
    built = _run(
        builder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source,
        cwd=tmp_path,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    _run(builder, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    shown = _run(builder, "-c", _SHOW, cwd=tmp_path, PYTHONPATH=str(site))
    assert shown.stdout.split(maxsplit=1) == [str(site / "indexer/migrations/__init__.py"), "[1]\n"], (
        shown.stderr
    )
    assert not (site / "migrations").exists()


@pytest.mark.slow
@pytest.mark.limit(240)
def test_from_an_editable_install(builder: Path, tmp_path: Path) -> None:
    source = _copy(tmp_path / "source")
    done = _run(
        builder, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", source,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for cwd in (tmp_path, source):
        shown = _run(builder, "-c", _SHOW, cwd=cwd)
        assert shown.stdout.split()[0] == str(source / "migrations/__init__.py"), shown.stderr
    _run(builder, "-m", "pip", "uninstall", "--quiet", "--yes", "atproto-indexer", cwd=tmp_path)
