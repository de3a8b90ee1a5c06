"""`tidemill receipts verify`: an export is judged offline, by the light install."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.receipt_ledger import BOOK, BOOK_FILE, PUBLIC, Document, Ledger, pending
from tidemill.client.cli import main

# Runs the command where `sys.argv[1]`, a list in JSON, names packages that are not installed.
LIGHT = """
import json, sys
missing = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(missing))
from tidemill.client.cli import main
status = main(sys.argv[2:])
heavy = {"torch", "redis", "numpy", "tokenizers", "protovalidate"} & {
    name for name, module in sys.modules.items() if module is not None
}
assert not heavy, heavy
raise SystemExit(status)
"""


def write(folder: Path, documents: Sequence[Document]) -> Path:
    path = folder / "receipts.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def settled(count: int) -> list[Document]:
    ledger = Ledger()
    return [ledger.settle(f"r{number}") for number in range(count)]


def light(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    missing = ["cryptography", "torch", "redis", "numpy", "tokenizers", "protovalidate"]
    command = [sys.executable, "-c", LIGHT, json.dumps(missing), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


def test_a_sound_export_verifies_in_the_light_install(tmp_path: Path) -> None:
    path = write(tmp_path, [*settled(3), pending()])
    ended = light("receipts", "verify", path, "--book", BOOK_FILE)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == ("4 receipts, all verify; signatures not checked: no --public-key\n")


def test_a_signature_that_cannot_be_checked_is_no_success(tmp_path: Path) -> None:
    path = write(tmp_path, settled(1))
    ended = light("receipts", "verify", path, "--book", BOOK_FILE, "--public-key", PUBLIC.hex())
    assert ended.returncode == 2
    assert "tidemill[receipts]" in ended.stderr
    assert "all verify" not in ended.stdout


def test_every_receipt_at_fault_is_named_with_its_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third, fourth = settled(4)
    second["amount_nano"] = 7
    fourth["signature"] = third["signature"]
    key = tmp_path / "key.hex"
    key.write_text(PUBLIC.hex())
    path = write(tmp_path, [first, second, third, fourth])
    arguments = [
        "receipts",
        "verify",
        str(path),
        "--book",
        str(BOOK_FILE),
        "--public-key",
        str(key),
    ]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "receipt r1 (line 2): amount_nano is 7, should be 83400\n" in said
    assert "receipt r3 (line 4): signature is not that of key" in said
    assert "r0" not in said
    assert "r2" not in said
    assert said.endswith("4 receipts, 2 at fault; signatures checked\n")
    assert main([*arguments, "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert {(fault["request_id"], fault["field"]) for fault in verdict["faults"]} >= {
        ("r1", "amount_nano"),
        ("r3", "signature"),
    }


def test_gaps_are_told_and_a_canonical_book_serves_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, _, fourth = settled(4)
    book = tmp_path / "book.json"
    book.write_bytes(BOOK.canonical_bytes + b"\n")
    assert (
        main(["receipts", "verify", str(write(tmp_path, [first, fourth])), "--book", str(book)])
        == 0
    )
    assert "chain of acme: positions 2 to 3 are not in this file\n" in capsys.readouterr().out


def test_an_object_that_is_no_receipt_is_at_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [*settled(1), {"request_id": "r"}])
    assert main(["receipts", "verify", str(path), "--book", str(BOOK_FILE)]) == 1
    assert "receipt r (line 2): " in capsys.readouterr().out


@pytest.mark.parametrize("line", ["a,csv,header", "[1]", "7", "[" * 100_000])
def test_a_line_that_is_no_object_is_one_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    path = write(tmp_path, settled(1))
    path.write_text(path.read_text() + line + "\n")
    assert main(["receipts", "verify", str(path), "--book", str(BOOK_FILE)]) == 1
    assert capsys.readouterr().out == (
        "line 2 is no JSON object (is it a CSV export? only JSONL can be verified)\n"
        "2 receipts, 1 at fault; signatures not checked: no --public-key\n"
    )


def test_a_file_without_a_receipt_does_not_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, [])
    path.write_text("\n")
    assert main(["receipts", "verify", str(path), "--book", str(BOOK_FILE)]) == 1
    said = capsys.readouterr().out
    assert said == "there is no receipt in this file: nothing was verified\n"


@pytest.mark.parametrize(
    ("content", "named"), [("{}", "book"), ("{", "book"), ("[1]", "book"), (None, "cannot be read")]
)
def test_a_book_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, named: str
) -> None:
    book = tmp_path / "a-book"
    if content is not None:
        book.write_text(content)
    path = write(tmp_path, settled(1))
    assert main(["receipts", "verify", str(path), "--book", str(book)]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "a-book" in said


def test_a_key_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, settled(1))
    arguments = ["receipts", "verify", str(path), "--book", str(BOOK_FILE), "--public-key"]
    assert main([*arguments, "no-such-file"]) == 2
    said = capsys.readouterr().err
    assert "--public-key no-such-file: no such file, and no public key, in PEM or 64 hex" in said
    assert main(["receipts", "verify", str(tmp_path / "none"), "--book", str(BOOK_FILE)]) == 2


def test_a_private_key_in_place_of_the_public_one_is_named_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2Vw\n-----END PRIVATE KEY-----\n"
    file = tmp_path / "signing.pem"
    file.write_text(secret)
    arguments = ["receipts", "verify", str(write(tmp_path, settled(1))), "--book", str(BOOK_FILE)]
    for key in (str(file), secret * 100):
        assert main([*arguments, "--public-key", key]) == 2
        said = capsys.readouterr().err
        assert "this is a private key" in said
        assert "MC4C" not in said
