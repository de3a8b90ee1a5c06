import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tidemill.errors import ConfigError, FailedPrecondition
from tidemill.kv.shm import STEP_BYTES, YOUNG_S, ShmArena, ShmArenas, ShmFolder, ShmWindows

SIZE = 3 * STEP_BYTES // 2
HOLD_AN_ARENA = """
import sys, time
from pathlib import Path
from tidemill.kv.shm import ShmArena, ShmFolder
print(ShmArena(ShmFolder(Path(sys.argv[1])), 4096).name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> ShmFolder:
    return ShmFolder(tmp_path / "shm")


def arenas_in(folder: ShmFolder) -> list[str]:
    return [each.name for each in folder.path.iterdir() if each.name != "id"]


def make_old(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's time of change cannot be set: let the clock go on instead."""
    later = path.stat().st_ctime + YOUNG_S + 1
    monkeypatch.setattr(time, "time", lambda: later)


def test_both_sides_of_a_folder_read_the_same_id_and_others_another(tmp_path: Path) -> None:
    one, same, other = (ShmFolder(tmp_path / name) for name in ("a", "a", "b"))
    assert len(one.id) == 16
    assert one.id == same.id != other.id
    assert one.path.stat().st_mode & 0o777 == 0o700
    assert (one.path / "id").stat().st_mode & 0o777 == 0o600
    assert [each.name for each in one.path.iterdir()] == ["id"]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "shm").mkdir()
    (tmp_path / "shm").chmod(mode)
    with pytest.raises(ConfigError, match="closed to others"):
        ShmFolder(tmp_path / "shm")


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    for name in ("file", "link", "file/below"):
        with pytest.raises(ConfigError, match="shm_dir"):
            ShmFolder(tmp_path / name)


def test_a_spoilt_id_is_refused(folder: ShmFolder) -> None:
    (folder.path / "id").write_bytes(b"short")
    with pytest.raises(ConfigError, match="16 bytes"):
        ShmFolder(folder.path)


def test_what_the_source_writes_the_puller_sees(folder: ShmFolder) -> None:
    arenas, windows = ShmArenas(folder), ShmWindows(folder)
    arena = arenas.lend(SIZE)
    assert arena.num_bytes == 2 * STEP_BYTES
    assert (folder.path / arena.name).stat().st_mode & 0o777 == 0o600
    window = windows.look(arena.name, arena.num_bytes, need=SIZE)
    window[SIZE - 4 : SIZE] = [1, 2, 3, 4]
    assert list(arena.memory[SIZE - 4 : SIZE]) == [1, 2, 3, 4]
    assert windows.look(arena.name, arena.num_bytes, need=SIZE) is window
    arenas.give_back(arena, reusable=True)
    arenas.close()
    windows.close()
    assert arenas_in(folder) == []


def test_an_arena_is_lent_again_only_when_its_source_is_done(folder: ShmFolder) -> None:
    arenas = ShmArenas(folder)
    first = arenas.lend(SIZE)
    second = arenas.lend(SIZE)
    assert first is not second
    arenas.give_back(first, reusable=True)
    arenas.give_back(second, reusable=False)
    assert arenas_in(folder) == [first.name]
    assert arenas.lend(100) is first
    larger = arenas.lend(100)
    assert larger is not first
    arenas.close()
    arenas.give_back(first, reusable=True)
    arenas.give_back(larger, reusable=True)
    assert arenas_in(folder) == []


def test_idle_arenas_and_open_windows_are_bounded(folder: ShmFolder) -> None:
    arenas = ShmArenas(folder, keep_bytes=2 * STEP_BYTES)
    windows = ShmWindows(folder, keep_bytes=2 * STEP_BYTES)
    lent = [arenas.lend(100) for _ in range(4)]
    for arena in lent:
        windows.look(arena.name, arena.num_bytes, need=100)
    assert len(windows._open) == 2
    for arena in lent:
        arenas.give_back(arena, reusable=True)
    assert sorted(arenas_in(folder)) == sorted(each.name for each in lent[2:])
    arenas.close()
    windows.sweep()
    assert len(windows._open) == 0


@pytest.mark.parametrize("kind", ["absent", "name", "above", "size", "small", "link", "pipe"])
def test_a_file_that_is_not_what_the_puller_says_is_refused(folder: ShmFolder, kind: str) -> None:
    arena = ShmArena(folder, STEP_BYTES)
    name, num_bytes, need = arena.name, STEP_BYTES, 100
    match kind:
        case "absent":
            name = secrets.token_hex(16)
        case "name":
            name = "id"
        case "above":
            name = "../" + arena.name[:29]
        case "size":
            num_bytes -= 1
        case "small":
            need = STEP_BYTES + 1
        case "link":
            name = secrets.token_hex(16)
            (folder.path / name).symlink_to(arena.name)
        case "pipe":
            name = secrets.token_hex(16)
            os.mkfifo(folder.path / name)
    windows = ShmWindows(folder)
    with pytest.raises(FailedPrecondition) as caught:
        windows.look(name, num_bytes, need=need)
    assert caught.value.reason == "SHM_UNAVAILABLE"
    assert len(windows._open) == 0
    arena.close()


def test_no_room_is_an_error_that_leaves_no_file(folder: ShmFolder) -> None:
    with pytest.raises(OSError, match=r"space|large|memory"):
        ShmArenas(folder).lend(1 << 62)
    assert arenas_in(folder) == []


def test_files_of_a_killed_process_are_swept_and_those_of_a_live_one_stay(
    folder: ShmFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", HOLD_AN_ARENA, str(folder.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert arenas_in(folder) == [name]
    assert folder.sweep() == 0  # too young to tell
    make_old(folder.path / name, monkeypatch)
    assert folder.sweep() == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert folder.sweep() == 1
    assert arenas_in(folder) == []


def test_a_swept_file_costs_the_source_no_memory_for_long(folder: ShmFolder) -> None:
    windows = ShmWindows(folder)
    arena = ShmArena(folder, 4096)
    window = windows.look(arena.name, 4096, need=1)
    arena.close()
    windows.sweep()
    assert len(windows._open) == 0
    window[:] = np.arange(4096, dtype=np.uint8)  # a write that was under way harms nobody
