"""Options that take a number refuse what is none, wherever they are."""

from __future__ import annotations

import pytest

from indexer.cli import main


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "command",
    [
        "host limit pds.test --requests-per-s",
        "demo --seconds",
        "demo --rate",
        "simulate --rate",
        "simulate --lies",
    ],
)
def test_a_number_is_finite(command: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), value])
    assert ended.value.code == 2
    assert f"'{command.rpartition(' ')[2]}': {value} is not" in capsys.readouterr().err
