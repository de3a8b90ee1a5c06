import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.cache.disk_files import HEADER_BYTES, BlockFolder, Cause, Header
from tidemill.errors import ConfigError
from tidemill.kv.pieces import sha256

PAYLOAD = os.urandom(10_000)
OTHER = os.urandom(10_000)


def header(payload: bytes, number: int = 1, namespace: bytes = b"n" * 32) -> Header:
    return Header(bytes([number]) * 32, namespace, len(payload), sha256(payload))


def path_of(folder: BlockFolder, number: int = 1) -> Path:
    return folder.root / "v1" / f"{number:02x}" / (f"{number:02x}" * 32)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[BlockFolder]:
    made = BlockFolder(tmp_path / "blocks")
    made.open()
    assert made.write(header(PAYLOAD), PAYLOAD, 5) is None
    yield made
    made.close()


def test_a_block_is_read_as_it_was_written_and_found_again(folder: BlockFolder) -> None:
    assert folder.read(header(PAYLOAD), 7) == PAYLOAD
    assert folder.scan([1]) == ([(header(PAYLOAD), 7)], [])
    assert folder.scan(range(2, 256)) == ([], [])
    folder.remove(b"\1" * 32)
    assert folder.read(header(PAYLOAD), 8) is Cause.MISSING
    assert folder.scan([1]) == ([], [])


def test_only_its_owner_can_read_a_block(folder: BlockFolder) -> None:
    path = path_of(folder)
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0


def flip(at: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 0x10
        path.write_bytes(content)

    return change


def cut(to: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, to)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (flip(3), Cause.CORRUPT),
        (flip(60), Cause.CORRUPT),
        (flip(HEADER_BYTES), Cause.CORRUPT),
        (flip(-1), Cause.CORRUPT),
        (cut(0), Cause.TRUNCATED),
        (cut(HEADER_BYTES - 1), Cause.TRUNCATED),
        (cut(HEADER_BYTES + 9_999), Cause.TRUNCATED),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), Cause.CORRUPT),
        (Path.unlink, Cause.MISSING),
        (replace_by_folder, Cause.SWAPPED),
        (replace_by_link, Cause.SWAPPED),
        (replace_by_pipe, Cause.TRUNCATED),
    ],
)
def test_a_damaged_file_is_told_from_a_good_one(
    folder: BlockFolder, damage: Callable[[Path], None], cause: Cause
) -> None:
    damage(path_of(folder))
    assert folder.read(header(PAYLOAD), 6) is cause


@pytest.mark.parametrize("other", [header(OTHER, 2), header(OTHER, 2, namespace=b"m" * 32)])
def test_a_good_file_under_another_name_is_not_taken(folder: BlockFolder, other: Header) -> None:
    assert folder.write(other, OTHER, 5) is None
    path_of(folder, 2).replace(path_of(folder))
    assert folder.read(header(PAYLOAD), 6) is Cause.SWAPPED
    assert folder.scan([1]) == ([], [Cause.SWAPPED])
    assert not path_of(folder).exists()


def test_a_block_rewritten_for_another_namespace_is_not_the_one_known(folder: BlockFolder) -> None:
    assert folder.write(header(OTHER), OTHER, 5) is None
    assert folder.read(header(PAYLOAD), 6) is Cause.SWAPPED


def test_a_scan_removes_what_is_no_block_and_leaves_what_is_not_ours(folder: BlockFolder) -> None:
    place = path_of(folder).parent
    (place / "notes.txt").write_text("mine")
    (place / ("01" * 31 + "02")).write_bytes(b"short")
    (place / ("01" * 31 + "03")).write_bytes(bytes(4000))
    found, faults = folder.scan([1])
    assert [each.block_hash for each, _ in found] == [b"\1" * 32]
    assert sorted(faults) == [Cause.CORRUPT, Cause.TRUNCATED]
    assert sorted(each.name for each in place.iterdir()) == ["01" * 32, "notes.txt"]


def test_what_was_half_written_is_removed_at_start(folder: BlockFolder) -> None:
    (folder.root / "partial" / "left").write_bytes(b"over")
    folder.close()
    folder.open()
    assert list((folder.root / "partial").iterdir()) == []
    assert folder.read(header(PAYLOAD), 6) == PAYLOAD


def test_a_second_process_is_refused_the_folder(folder: BlockFolder) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from services.cache.disk_files import BlockFolder\n"
        "BlockFolder(Path(sys.argv[1])).open()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(folder.root)], capture_output=True, check=False
    )
    assert run.returncode != 0
    assert b"another process uses this folder" in run.stderr


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="file/blocks: cannot be used"):
        BlockFolder(tmp_path / "file" / "blocks").open()


def test_a_folder_that_was_removed_is_noticed_and_begun_anew(folder: BlockFolder) -> None:
    shutil.rmtree(folder.root)
    assert folder.read(header(PAYLOAD), 6) is Cause.FOLDER
    assert folder.write(header(OTHER, 2), OTHER, 6) is None
    assert folder.read(header(OTHER, 2), 7) == OTHER
    assert folder.read(header(PAYLOAD), 7) is Cause.MISSING


def test_a_file_size_limit_counts_as_full_and_leaves_nothing(folder: BlockFolder) -> None:
    # The limit is this process's: it is lifted again at once.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        assert folder.write(header(OTHER, 2), OTHER, 6) is Cause.FULL
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((folder.root / "partial").iterdir()) == []
    assert not path_of(folder, 2).exists()


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, Cause.FULL),
        (errno.EDQUOT, Cause.FULL),
        (errno.EROFS, Cause.DENIED),
        (errno.EACCES, Cause.DENIED),
        (errno.EIO, Cause.IO),
        (errno.ESTALE, Cause.IO),
    ],
)
def test_every_failure_of_the_system_has_a_cause(
    folder: BlockFolder, number: int, cause: Cause
) -> None:
    assert folder._cause(OSError(number, "x")) is cause
