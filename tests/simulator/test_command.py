from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from indexer.cli import main
from indexer.config import load
from tests.paths import ROOT

RUN = [sys.executable, "-c", "from indexer.commands.simulate import simulate; simulate()"]


def start(*options: str) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    process = subprocess.Popen(
        [*RUN, "--json", *options], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def finish(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(10)
    finally:
        process.kill()
        process.communicate()


def read(url: str, data: bytes | None = None) -> Any:
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=10) as answer:
        return json.load(answer)


def test_prints_its_addresses_and_ends_with_its_parent() -> None:
    process, addresses = start(
        "--accounts", "2", "--history-accounts", "0", "--pds", "3", "--rate", "0", "--exit-with-parent"
    )
    assert set(addresses) == {"plc", "relay", "relays", "pds", "control", "dns"}
    assert len(addresses["pds"]) == 3
    assert addresses["relay"].startswith("ws://127.0.0.1:")
    assert read(addresses["control"] + "/state")["accounts"] == 2
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert finish(process) == 0


def test_prints_the_settings_of_a_daemon_that_follows_it(tmp_path: Path) -> None:
    options = ("--accounts", "1", "--history-accounts", "0", "--rate", "0")
    process = subprocess.Popen([*RUN, *options], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = [line.decode() for line in iter(process.stdout.readline, b"Ctrl-C ends it.\n")]
    process.terminate()
    finish(process)
    addresses = {line.split()[0]: line.split()[1] for line in said if line[:1] not in "\n"}
    (tmp_path / "follow.toml").write_text("".join(line for line in said if " = " in line))
    settings = load(tmp_path / "follow.toml", environment=False)
    assert (settings.upstreams, settings.plc_urls) == ([addresses["relay"]], [addresses["plc"]])
    assert (settings.filter.mode, settings.network.allow_private) == ("full", True)
    assert settings.network.dns_server == addresses["dns"]
    assert settings.data_dir != load(environment=False).data_dir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_at_a_signal(number: signal.Signals) -> None:
    process, _ = start("--accounts", "1", "--history-accounts", "0")
    process.send_signal(number)
    assert finish(process) == 0


def test_a_killed_network_comes_back_with_its_keys_records_and_seqs(tmp_path: Path) -> None:
    options = ("--state", str(tmp_path), "--rate", "3000", "--accounts", "5", "--history-records", "20")
    process, addresses = start(*options)
    while read(addresses["control"] + "/state")["commits"] < 150:
        pass
    seen = read(addresses["control"] + "/ledger?values=1")
    process.kill()
    finish(process)
    process, again = start(*options, "--paused")
    try:
        assert again == addresses
        ledger = read(again["control"] + "/ledger?values=1")
        assert ledger["seq"] >= seen["seq"]
        assert ledger["commits"] >= seen["commits"]
        for did, entry in seen["accounts"].items():
            found = ledger["accounts"][did]
            if found["status"] == entry["status"] == "active":
                assert found["rev"] >= entry["rev"]
            if found["rev"] == entry["rev"]:
                assert {**found, "handle": ""} == {**entry, "handle": ""}
    finally:
        process.terminate()
        finish(process)


def test_two_networks_cannot_share_a_state(tmp_path: Path) -> None:
    process, _ = start("--state", str(tmp_path), "--accounts", "1", "--history-accounts", "0", "--rate", "0")
    second = subprocess.run([*RUN, "--state", str(tmp_path)], cwd=ROOT, capture_output=True, timeout=20)
    assert second.returncode == 1
    assert b"in use" in second.stderr
    process.terminate()
    finish(process)


def test_a_port_in_use_that_was_asked_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit):
            main(["simulate", "--accounts", "1", "--history-accounts", "0", "--port-base", port])
    error = capsys.readouterr().err
    assert f"('127.0.0.1', {port}): address already in use; choose another --port-base" in error
