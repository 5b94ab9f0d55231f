"""Real repositories agree with what their hosts say; one flipped bit never passes.

Each flip is checked in this process through the function under `indexer car verify`.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import orjson
import pytest

from indexer.atproto.cid import format_cid
from indexer.commands.car import signer_of_document, verify_car
from indexer.commands.car_walk import Signer
from indexer.errors import BadInput
from indexer.repo.walker import index_repo
from tests.commands.real_repos import truth_of
from tests.paths import SHARED_DATA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not SHARED_DATA.is_dir(), reason="the captured data (../shared/data) is not beside this checkout"
    ),
]

REPOS = sorted(path.stem for path in (SHARED_DATA / "repos").glob("*.car"))
SESSION = SHARED_DATA / "session"
SESSION_CARS = sorted((SESSION / "cars").glob("*.car"))


def _records(buffer: bytes) -> dict[str, str]:
    return {path: format_cid(cid) for path, cid, *_ in index_repo(buffer).records}


@pytest.mark.parametrize("name", REPOS)
def test_a_repository_agrees_with_its_truth_file(name: str) -> None:
    truth = truth_of(name)
    buffer = (SHARED_DATA / "repos" / f"{name}.car").read_bytes()
    answer = verify_car(buffer, Signer(truth["did"], truth["signingKey"]))
    assert {key: answer[key] for key in ("did", "rev", "commit", "data", "records", "signature")} == {
        **{key: truth[key] for key in ("did", "rev", "commit", "data")},
        "records": len(truth["records"]),
        "signature": "valid",
    }
    assert _records(buffer) == truth["records"]


def _signer_of(buffer: bytes) -> Signer:
    """By the DID document of the session."""
    did = verify_car(buffer)["did"]
    document = orjson.loads((SESSION / "diddocs.json").read_bytes())[did]["doc"]
    return signer_of_document(orjson.dumps(document))


@pytest.mark.parametrize("file", SESSION_CARS, ids=lambda path: path.stem)
def test_a_sessions_repository_agrees_with_its_truth_and_its_did_document(file: Path) -> None:
    buffer = file.read_bytes()
    answer = verify_car(buffer, _signer_of(buffer))
    accounts = orjson.loads((SESSION / "truth.json").read_bytes())["accounts"]
    truth = next(account for account in accounts if account["did"] == answer["did"])
    assert (answer["data"], answer["rev"], answer["signature"]) == (truth["data"], truth["rev"], "valid")
    assert _records(buffer) == truth["records"]


def _refused(buffer: bytearray, place: int, bit: int, signer: Signer) -> str | None:
    """The reason why the file with one flipped bit is refused; None when it passes."""
    buffer[place] ^= 1 << bit
    try:
        verify_car(bytes(buffer), signer)
    except BadInput as error:
        return str(error)
    finally:
        buffer[place] ^= 1 << bit
    return None


def _flips(name: str, size: int) -> list[tuple[int, int]]:
    """(place, bit): every byte of the smallest archives, 2,000 seeded places of the others."""
    random = Random(name)
    if name in ("empty", "ten"):
        return [(place, random.randrange(8)) for place in range(size)]
    return [(random.randrange(size), random.randrange(8)) for _ in range(2000)]


def _assert_no_flip_passes(file: Path, signer: Signer) -> None:
    buffer = bytearray(file.read_bytes())
    reasons = [_refused(buffer, place, bit, signer) for place, bit in _flips(file.stem, len(buffer))]
    assert reasons.count(None) == 0
    assert not [reason for reason in reasons if reason is not None and len(reason) < 16]


@pytest.mark.limit(1800)
@pytest.mark.parametrize("name", REPOS)
def test_one_flipped_bit_never_passes_and_the_error_says_what_broke(name: str) -> None:
    truth = truth_of(name)
    file = SHARED_DATA / "repos" / f"{name}.car"
    _assert_no_flip_passes(file, Signer(truth["did"], truth["signingKey"]))


@pytest.mark.limit(1800)
@pytest.mark.parametrize("file", SESSION_CARS, ids=lambda path: path.stem)
def test_one_flipped_bit_of_a_sessions_repository_never_passes(file: Path) -> None:
    _assert_no_flip_passes(file, _signer_of(file.read_bytes()))
