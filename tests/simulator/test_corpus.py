from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from indexer.simulator.corpus import build_car, cached_car, pregenerate, write_car
from indexer.simulator.frames import frame_seq
from tests.simulator import strict


def read(data: bytes, did_key: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(commit, records) of a CAR, verified."""
    root, blocks = strict.read_car(data)
    commit = strict.decode(blocks[root])
    assert strict.signature_valid(commit, did_key)
    leaves = strict.flatten(commit["data"].set(base="base32"), blocks)
    records = {
        item.key.decode(): str(item.value.set(base="base32"))
        for item in leaves
        if isinstance(item, strict.Leaf)
    }
    assert len(records) == len(leaves)
    return commit, records


def test_a_built_car_is_a_whole_signed_repository() -> None:
    out = io.BytesIO()
    info = write_car(out, seed=5, records=300)
    commit, records = read(out.getvalue(), info.signing_key)
    assert (commit["did"], commit["rev"], str(commit["data"].set(base="base32"))) == (
        info.did,
        info.rev,
        info.data,
    )
    assert len(records) == info.records == 300
    assert info.bytes == len(out.getvalue())
    assert len({path.partition("/")[0] for path in records}) >= 6


def test_cars_come_in_the_size_asked_for_and_from_the_seed() -> None:
    for size in (3_000, 300_000):
        out = io.BytesIO()
        write_car(out, size=size)
        assert size * 0.8 < len(out.getvalue()) < size * 1.2 + 500
    assert build_car(1, 40) == build_car(1, 40)
    assert build_car(1, 40) != build_car(2, 40)
    with pytest.raises(ValueError, match="how many"):
        write_car(io.BytesIO())


def test_cached_cars_are_made_once(tmp_path: Path) -> None:
    path, info = cached_car(tmp_path, seed=3, records=20)
    made = path.stat().st_mtime_ns
    again, same = cached_car(tmp_path, seed=3, records=20)
    assert (again, again.stat().st_mtime_ns, same) == (path, made, info)
    assert sorted(item.suffix for item in tmp_path.iterdir()) == [".car", ".json"]


@pytest.mark.parametrize("records", [0, 25])
def test_a_corpus_folds_to_its_truth(tmp_path: Path, records: int) -> None:
    corpus = pregenerate(tmp_path, seed=4, accounts=5, commits=60, records=records)
    truth, documents = corpus.truth(), corpus.documents()
    assert set(truth["accounts"]) == set(documents)
    folded: dict[str, dict[str, str]] = {did: {} for did in documents}
    for did, path in corpus.cars().items():
        folded[did] = read(path.read_bytes(), truth["accounts"][did]["signing_key"])[1]
        assert len(folded[did]) == records
    assert len(corpus.cars()) == (5 if records else 0)
    for number, frame in enumerate(corpus.frames(), start=1):
        _kind, payload = strict.split_frame(frame)
        assert payload["seq"] == number == frame_seq(frame)
        for op in payload.get("ops", ()):
            repo = folded[payload["repo"]]
            if op["cid"] is None:
                del repo[op["path"]]
            else:
                repo[op["path"]] = str(op["cid"].set(base="base32"))
    assert folded == {did: entry["records"] for did, entry in truth["accounts"].items()}
    for did, entry in documents.items():
        key = entry["doc"]["verificationMethod"][0]["publicKeyMultibase"]
        assert "did:key:" + key == truth["accounts"][did]["signing_key"]


def test_a_corpus_is_made_once_and_again_the_same(tmp_path: Path) -> None:
    first = pregenerate(tmp_path / "a", accounts=3, commits=20)
    assert pregenerate(tmp_path / "a", accounts=3, commits=20).path == first.path
    assert pregenerate(tmp_path / "a", accounts=3, commits=21).path != first.path
    twin = pregenerate(tmp_path / "b", accounts=3, commits=20)
    assert {did: e["records"] for did, e in twin.truth()["accounts"].items()} == {
        did: e["records"] for did, e in first.truth()["accounts"].items()
    }
