from __future__ import annotations

import json

import pytest
from multiformats import multibase

from indexer.simulator import keys
from indexer.simulator.keys import K256, P256, SigningKey, base58btc
from indexer.simulator.wire import commit_block
from tests.paths import interop
from tests.simulator import strict


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("curve", [K256, P256])
def test_commits_carry_valid_low_s_signatures(
    curve: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(keys, "coincurve", None)
    for number in range(12):  # half of all raw signatures are high-S
        key = SigningKey.derive(curve, f"test/{number}")
        block = commit_block("did:plc:abc", "3kdgeujwlq32y", bytes.fromhex("01711220") + bytes(32), key)
        commit = strict.decode(block)
        assert list(commit) == ["did", "rev", "sig", "data", "prev", "version"]
        assert strict.signature_valid(commit, key.did_key)
        assert not strict.signature_valid({**commit, "rev": "3kdgeujwlq32z"}, key.did_key)


def test_public_keys_of_the_vectors() -> None:
    for vector in json.loads(interop("crypto/w3c_didkey_K256.json").read_text()):
        assert SigningKey(K256, bytes.fromhex(vector["privateKeyBytesHex"])).did_key == vector["publicDidKey"]
    for vector in json.loads(interop("crypto/w3c_didkey_P256.json").read_text()):
        secret = multibase.decode("z" + vector["privateKeyBytesBase58"])
        assert SigningKey(P256, secret).did_key == vector["publicDidKey"]


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x00\x00a", bytes(range(40))])
def test_base58_is_that_of_multiformats(data: bytes) -> None:
    assert "z" + base58btc(data) == multibase.encode(data, "base58btc")
