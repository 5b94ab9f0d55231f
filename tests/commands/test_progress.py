"""Bars are for terminals, and never on standard output."""

from __future__ import annotations

import io
import sys

import pytest

from indexer.commands.progress import bar, counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("checking") as tell:
        tell("checking", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_what_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with bar("checking") as tell:
        tell("counting", 30, 20)  # an estimate was too low
    assert "counting" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_one_is_told_as_one() -> None:
    assert counted(1, "problem") == "1 problem"
    assert counted(0, "problem") == "0 problems"
    assert [counted(n, "repository", "repositories") for n in (1, 2)] == ["1 repository", "2 repositories"]
