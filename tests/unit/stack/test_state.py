import stat
from pathlib import Path

import pytest

from services.stack.state import StateDirectory
from tidemill.errors import ConfigError
from tidemill.kv.shm import SharedMemory


def test_everything_is_for_its_owner_alone(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    with state.held():
        state.prepare(empty=False)
        private = [*state.secrets.iterdir(), *state.certs.glob("*.key")]
        assert len(private) > 8
        for path in private:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
        assert min(len(state.secret(path.name)) for path in state.secrets.iterdir()) >= 32


def test_secrets_are_kept_from_one_start_to_the_next(tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        state = StateDirectory(tmp_path)
        with state.held():
            state.prepare(empty=False)
            kept.append((state.secret("pepper"), (state.certs / "ca.pem").read_bytes()))
    assert kept[0] == kept[1]


def test_an_empty_start_forgets_the_ledger_and_keeps_the_secrets(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    with state.held():
        state.prepare(empty=False)
        pepper = state.secret("pepper")
        (tmp_path / "redis-ledger").mkdir()
        state.prepare(empty=True)
        assert not (tmp_path / "redis-ledger").exists()
        assert state.secret("pepper") == pepper


def test_an_empty_start_forgets_the_caches_disk(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.cache_disk.mkdir()
    state.prepare(empty=False)
    assert state.cache_disk.exists()
    state.prepare(empty=True)
    assert not state.cache_disk.exists()


def test_shared_memory_is_this_stacks_own_and_goes_with_it(tmp_path: Path) -> None:
    one, other = StateDirectory(tmp_path / "one"), StateDirectory(tmp_path / "other")
    with one.shared_memory() as folder, other.shared_memory() as another:
        assert folder != another
        SharedMemory(folder).arenas.lend(100)
        assert folder.exists()
    assert not folder.exists()


def test_a_second_stack_in_the_same_directory_is_told_who_runs(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    with state.held():
        state.note_pids({"router": 17, "cache": 4})
        with (
            pytest.raises(ConfigError, match="17 router, 4 cache"),
            StateDirectory(tmp_path).held(),
        ):
            pass
    with StateDirectory(tmp_path).held():
        pass
