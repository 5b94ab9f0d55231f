"""`indexer car`: what it prints, what it refuses, and that every refusal is one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from indexer.atproto.car import car_block, car_header, read_car
from indexer.atproto.cid import dag_cbor_cid, parse_cid
from indexer.atproto.commit import Commit, encode_commit
from indexer.atproto.dagcbor import record_from_json
from indexer.atproto.mst import build, prove
from indexer.cli import main
from indexer.commands.car import car
from indexer.errors import BadInput
from tests.commands.real_repos import repo_file, truth_of


def run(*arguments: object) -> Result:
    return CliRunner().invoke(car, [str(argument) for argument in arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs the command as a user does; it must exit 1 with one line on standard error."""
    with pytest.raises(SystemExit) as ended:
        main(["car", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (1, "")
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", ["empty", "ten", "kilo"])
def test_verify_agrees_with_the_host(name: str) -> None:
    truth = truth_of(name)
    file = repo_file(f"{name}.car")
    result = run("verify", file, "--key", truth["signingKey"], "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    assert list(answer) == ["did", "rev", "commit", "data", "records", "blocks", "bytes", "signature"]
    assert {key: answer[key] for key in ("did", "rev", "commit", "data")} == {
        key: truth[key] for key in ("did", "rev", "commit", "data")
    }
    assert (answer["records"], answer["signature"]) == (len(truth["records"]), "valid")
    assert answer["bytes"] == file.stat().st_size


def test_without_a_key_the_signature_is_not_checked() -> None:
    result = run("verify", repo_file("ten.car"))
    assert result.exit_code == 0
    assert "signature         not checked" in result.stdout


def test_ls_gives_every_path_and_cid_in_key_order() -> None:
    truth = truth_of("kilo")
    lines = run("ls", repo_file("kilo.car"), "--json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["path"]: row["cid"] for row in rows} == truth["records"]
    assert [row["path"] for row in rows] == sorted(truth["records"])
    plain = run("ls", repo_file("kilo.car")).stdout.splitlines()
    assert plain == [f"{row['path']} {row['cid']}" for row in rows]


def test_ls_of_a_prefix() -> None:
    truth = truth_of("kilo")
    lines = run("ls", repo_file("kilo.car"), "--prefix", "app.bsky.feed.post/").stdout.splitlines()
    wanted = sorted(path for path in truth["records"] if path.startswith("app.bsky.feed.post/"))
    assert [line.split()[0] for line in lines] == wanted
    assert wanted
    assert run("ls", repo_file("kilo.car"), "--prefix", "zz").stdout == ""


def test_prove_says_whether_a_record_exists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = truth_of("kilo")
    path, cid = sorted(truth["records"].items())[400]
    blocks = read_car(repo_file("kilo.car").read_bytes()).blocks
    commit = parse_cid(truth["commit"])
    proof = [blocks[commit], *prove(parse_cid(truth["data"]), path, blocks.get)]
    part = tmp_path / "part.car"
    part.write_bytes(car_header([commit]) + b"".join(car_block(dag_cbor_cid(each), each) for each in proof))
    for file, block in ((part, False), (repo_file("kilo.car"), True)):
        answer = json.loads(run("prove", file, path, "--key", truth["signingKey"], "--json").stdout)
        assert (answer["did"], answer["rev"], answer["path"]) == (truth["did"], truth["rev"], path)
        assert (answer["cid"], answer["present"], answer["block"]) == (cid, True, block)
        assert answer["signature"] == "valid"
    absent = run("prove", repo_file("kilo.car"), "app.bsky.feed.post/0", "--json")
    assert absent.exit_code == 0
    assert json.loads(absent.stdout)["cid"] is None
    assert "nothing is proven below it" in refusal(capsys, "prove", part, sorted(truth["records"])[0])
    text = run("prove", repo_file("kilo.car"), "app.bsky.feed.post/0").stdout
    assert [line.split()[1] for line in text.splitlines()[3:6]] == ["-", "False", "False"]
    assert "present           True" in run("prove", repo_file("kilo.car"), path).stdout


@pytest.mark.parametrize("path", ["nonsense", "app.bsky.feed.post", "app.bsky.feed.post/", "/self", "a/b/c"])
def test_prove_refuses_what_is_no_path(path: str) -> None:
    result = run("prove", repo_file("ten.car"), path)
    assert result.exit_code == 2
    assert f"not collection/rkey: {path!r}" in result.stderr


def test_inspect_counts_what_is_inside() -> None:
    truth = truth_of("kilo")
    answer = json.loads(run("inspect", repo_file("kilo.car"), "--json").stdout)
    assert sum(answer["collections"].values()) == answer["records"] == len(truth["records"])
    distinct = len(set(truth["records"].values()))
    assert answer["blocks"] - answer["duplicate_blocks"] == 1 + answer["tree_nodes"] + distinct
    assert (answer["unlinked_blocks"], answer["roots"]) == (0, [truth["commit"]])
    assert 2 <= answer["tree_depth"] <= 10
    assert "app.bsky." in run("inspect", repo_file("kilo.car")).stdout


def test_inspect_of_the_empty_repository() -> None:
    answer = json.loads(run("inspect", repo_file("empty.car"), "--json").stdout)
    assert (answer["records"], answer["blocks"], answer["tree_nodes"]) == (0, 2, 1)


def test_extract_one_record_as_json_and_raw() -> None:
    path, value = next(iter(truth_of("ten")["values"].items()))
    file = repo_file("ten.car")
    assert json.loads(run("extract", file, path).stdout) == value
    assert run("extract", file, path, "--raw").stdout_bytes == record_from_json(value)


def test_extract_everything_and_never_over_existing_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = truth_of("ten")
    out = tmp_path / "records"
    assert run("extract", repo_file("ten.car"), "--all", "-o", out).exit_code == 0
    found = {
        str(file.relative_to(out)).removesuffix(".json"): json.loads(file.read_text())
        for file in out.rglob("*.json")
    }
    assert found == truth["values"]
    again = refusal(capsys, "extract", repo_file("ten.car"), "--all", "-o", out)
    assert "File exists" in again


def _with_an_odd_record(file: Path) -> None:
    """A repository of three records; the middle one's bytes are no JSON string."""
    fine = record_from_json({"$type": "a.b.c", "text": "fine"})
    odd = b"\xa1aaa\xff"  # {"a": a text that is not UTF-8}
    records = [("a.b.c/1", fine), ("a.b.c/2", odd), ("a.b.c/3", fine)]
    tree = build((path, dag_cbor_cid(block)) for path, block in records)
    commit = encode_commit(
        Commit("did:plc:aaaaaaaaaaaaaaaaaaaaaaaa", 3, tree.root, "3jzfcijpj2z2a", None, b"\1" * 64)
    )
    root = dag_cbor_cid(commit)
    blocks = {root: commit, **tree.nodes, **{dag_cbor_cid(block): block for _, block in records}}
    file.write_bytes(car_header([root]) + b"".join(car_block(cid, block) for cid, block in blocks.items()))


def test_a_record_without_a_json_form_is_named_and_the_others_are_written(tmp_path: Path) -> None:
    file, out = tmp_path / "odd.car", tmp_path / "out"
    _with_an_odd_record(file)
    result = run("extract", file, "--all", "-o", out)
    assert isinstance(result.exception, BadInput)
    assert "1 record without a JSON form left out" in str(result.exception)
    assert "a.b.c/2 (" in str(result.exception)
    assert "2 records written to" in result.stderr
    assert sorted(path.name for path in out.rglob("*.json")) == ["1.json", "3.json"]
    assert run("extract", file, "--all", "--raw", "-o", out).exit_code == 0
    assert run("extract", file, "a.b.c/1", "-o", tmp_path / "one").stderr.startswith("1 record written")


@pytest.mark.parametrize("raw", [(), ("--raw",)])
def test_a_record_whose_name_no_file_may_have_is_named_and_the_others_are_written(
    tmp_path: Path, raw: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    [long] = [path for path in truth_of("kilo")["records"] if len(path) > 255]
    result = run("extract", repo_file("kilo.car"), "--all", "-o", out, *raw)
    assert isinstance(result.exception, BadInput)
    what = "1 record left out whose names are too long for the file system"
    assert str(result.exception) == f"{what}: {long}"
    assert "999 records written to" in result.stderr
    assert sum(1 for path in out.rglob("*") if path.is_file()) == 999


def test_a_single_record_whose_name_no_file_may_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(path for path in truth_of("kilo")["records"] if len(path) > 255)
    assert "File name too long" in refusal(capsys, "extract", repo_file("kilo.car"), path, "-o", tmp_path)


def test_a_dash_is_standard_input() -> None:
    data = repo_file("ten.car").read_bytes()
    result = CliRunner().invoke(car, ["verify", "-", "--json"], input=data)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["bytes"] == len(data)


@pytest.mark.limit(5)
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/urandom"])
def test_an_endless_file_is_refused_by_its_head(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/proc/self/io").open() as counters:
        before = int(counters.readline().split()[1])
    refusal(capsys, "verify", name)
    with Path("/proc/self/io").open() as counters:
        assert int(counters.readline().split()[1]) - before < 1 << 20


def test_a_path_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "extract", repo_file("ten.car"), "app.bsky.feed.post/nope")
    assert "has no record app.bsky.feed.post/nope" in message


@pytest.mark.parametrize("arguments", [[], ["--all"], ["a.b.c/d", "--all", "-o", "x"]])
def test_extract_wants_one_path_or_all_into_a_folder(arguments: list[str]) -> None:
    assert run("extract", repo_file("ten.car"), *arguments).exit_code == 2


OTHER_KEY = "did:key:zQ3shqwJEJyMBsBXCWyCBpUBMqxcon9oHB7mCvx4sSpMdLJwc"


def test_another_key_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "signature" in refusal(capsys, "verify", repo_file("ten.car"), "--key", OTHER_KEY)
    assert "key" in refusal(capsys, "verify", repo_file("ten.car"), "--key", "did:key:zNotAKey")


def _document(did: str, key: str) -> str:
    method = {"id": f"{did}#atproto", "type": "Multikey", "controller": did}
    return json.dumps(
        {"id": did, "verificationMethod": [{**method, "publicKeyMultibase": key.removeprefix("did:key:")}]}
    )


def test_a_did_document_gives_the_account_and_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = truth_of("ten")
    file = tmp_path / "did.json"
    file.write_text(_document(truth["did"], truth["signingKey"]))
    answer = run("verify", repo_file("ten.car"), "--did-document", file, "--json")
    assert json.loads(answer.stdout)["signature"] == "valid"
    stranger = "did:plc:aaaaaaaaaaaaaaaaaaaaaaaa"
    file.write_text(_document(stranger, truth["signingKey"]))
    assert stranger in refusal(capsys, "verify", repo_file("ten.car"), "--did-document", file)
    for text in ("{", "[]", "{}", json.dumps({"id": truth["did"]})):
        file.write_text(text)
        assert "DID document" in refusal(capsys, "verify", repo_file("ten.car"), "--did-document", file)


@pytest.mark.parametrize("command", ["verify", "inspect", "ls"])
def test_a_damaged_file_is_refused_by_every_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = repo_file("ten.car").read_bytes()
    file = tmp_path / "damaged.car"
    flipped = bytearray(data)
    flipped[-1] ^= 1
    for damaged in (data[:-1], bytes(flipped), data + b"\x00", b"", b"\xff" * 100):
        file.write_bytes(damaged)
        refusal(capsys, command, file)
