from __future__ import annotations

import json
from typing import Any

import pytest

from tests.atproto.lexicon import Invalid, check_lexicon, check_record
from tests.paths import interop


def load(name: str) -> Any:
    return json.loads(interop(f"lexicon/{name}.json").read_text())


def record_verdicts(name: str) -> dict[str, bool]:
    """Whether each fixture fits; numbered, for two fixtures have one name."""
    lexicon, verdicts = load("catalog/record"), {}
    for number, case in enumerate(load(name)):
        try:
            check_record(lexicon, case["rkey"], case["data"])
            verdicts[f"{number} {case['name']}"] = True
        except Invalid:
            verdicts[f"{number} {case['name']}"] = False
    return verdicts


@pytest.mark.parametrize("name", ["permission-set", "procedure", "query", "record", "subscription"])
def test_interop_catalog(name: str) -> None:
    check_lexicon(load(f"catalog/{name}"))


def test_interop_valid_lexicons() -> None:
    cases = load("lexicon-valid")
    for case in cases:
        check_lexicon(case["lexicon"])
    assert len(cases) == 3


def test_interop_invalid_lexicons() -> None:
    cases = load("lexicon-invalid")
    for case in cases:
        with pytest.raises(Invalid):
            check_lexicon(case["lexicon"])
    assert len(cases) == 7


def test_interop_valid_records() -> None:
    verdicts = record_verdicts("record-data-valid")
    assert [name for name, fits in verdicts.items() if not fits] == []
    assert len(verdicts) == 3


def test_interop_invalid_records() -> None:
    verdicts = record_verdicts("record-data-invalid")
    assert [name for name, fits in verdicts.items() if fits] == []
    assert len(verdicts) == 50
