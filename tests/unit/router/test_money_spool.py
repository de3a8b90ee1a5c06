import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from services.router.money.spool import Folder, Spool, line_of, parse
from tidemill.errors import ConfigError


def records(spool: Spool) -> list[bytes]:
    return [record for path in spool.closed_segments() for record in spool.read(path)]


def spooling_process(folder: Path, router_id: str, code: str) -> None:
    script = (
        "import os, pathlib\n"
        "from services.router.money.spool import Spool\n"
        f"spool = Spool(pathlib.Path({str(folder)!r}), {router_id!r})\n{code}"
    )
    subprocess.run([sys.executable, "-c", script], check=False, env=dict(os.environ))


def test_what_a_killed_router_appended_is_read_by_its_next_life(tmp_path: Path) -> None:
    spooling_process(
        tmp_path, "r1", "spool.append(b'one'); spool.append(b'two'); os.kill(os.getpid(), 9)"
    )
    spool = Spool(tmp_path, "r1")
    assert records(spool) == [b"one", b"two"]
    spool.close()


def test_another_router_adopts_the_folder_of_a_dead_one_and_leaves_none_behind(
    tmp_path: Path,
) -> None:
    spooling_process(tmp_path, "dead", "spool.append(b'one'); os.kill(os.getpid(), 9)")
    spool = Spool(tmp_path, "alive")
    assert records(spool) == []
    spool.adopt()
    assert records(spool) == [b"one"]
    for path in spool.closed_segments():
        spool.remove(path)
    spool.release_adopted()
    assert not (tmp_path / "dead").exists()
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_living_router_is_nobody_elses(tmp_path: Path) -> None:
    one, two = Spool(tmp_path, "one"), Spool(tmp_path, "two")
    one.append(b"mine")
    two.adopt()
    assert records(two) == []
    with pytest.raises(ConfigError, match="one"):
        Spool(tmp_path, "one", wait_s=0)
    one.close()
    two.adopt()
    assert records(two) == [b"mine"]
    two.close()


def test_a_router_that_is_back_waits_for_the_neighbour_that_adopted_its_folder(
    tmp_path: Path,
) -> None:
    neighbour = Folder.take(tmp_path / "back")
    assert neighbour is not None
    threading.Timer(0.2, neighbour.give_back).start()
    spool = Spool(tmp_path, "back", wait_s=10)
    spool.append(b"mine")
    assert records(spool) == [b"mine"]
    spool.close()


def test_records_are_read_in_the_order_in_which_they_were_appended(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "r")
    for number in range(3):
        spool.append(b"%d" % number)
        spool.closed_segments()
    spool.append(b"3")
    assert records(spool) == [b"0", b"1", b"2", b"3"]
    spool.close()


@pytest.mark.parametrize("cut", range(1, 70))
def test_a_torn_tail_is_left_out_and_told(cut: int) -> None:
    content = line_of(b"whole") + line_of(b"torn")
    found = parse(content[: -min(cut, len(line_of(b"torn")) - 1)])
    assert (found.records, found.torn, found.damaged) == ((b"whole",), True, 0)


def test_damage_before_the_end_is_counted_and_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "r")
    for record in (b"one", b"two", b"three"):
        spool.append(record)
    (path,) = spool.closed_segments()
    content = path.read_bytes()
    path.write_bytes(content.replace(b" two", b" twa"))
    assert parse(path.read_bytes()).damaged == 1
    assert spool.read(path) == [b"one", b"three"]
    assert path.with_suffix(".damaged").read_bytes() == path.read_bytes()
    spool.close()


def test_after_a_write_that_failed_the_next_record_stands_in_a_segment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, "r")
    spool.append(b"one")
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:5]))
    with pytest.raises(OSError, match="5 of"):
        spool.append(b"half")
    monkeypatch.undo()
    spool.append(b"two")
    assert records(spool) == [b"one", b"two"]
    spool.close()


def test_a_record_is_on_the_disk_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def counting(file: int) -> None:
        synced.append(file)
        fsync(file)

    monkeypatch.setattr(os, "fsync", counting)
    spool = Spool(tmp_path, "r")
    before = len(synced)
    spool.append(b"one")
    assert len(synced) == before + 2, "the new segment's folder, then the segment"
    spool.append(b"two")
    assert len(synced) == before + 3
    spool.close()


def test_a_spool_that_cannot_be_made_is_a_mistake_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="spool_dir"):
        Spool(tmp_path / "file", "r")
