import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from tidemill.config import load
from tidemill.errors import ConfigError


class Mode(enum.Enum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True)
class Limits:
    tokens: int = 100
    share: float = 0.5


@dataclass(frozen=True)
class Tls:
    cert: Path
    key: Path


@dataclass(frozen=True)
class Settings:
    name: str = "n"
    queue_size: int = 4
    verbose: bool = False
    mode: Mode = Mode.SAFE
    level: Literal["low", "high"] = "low"
    peers: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    limits: Limits = Limits()
    tls: Tls | None = None
    secret: str | None = None
    key_file: Path | None = None
    pools: tuple[Limits, ...] = ()

    def __post_init__(self) -> None:
        if self.queue_size < 0:
            raise ValueError("queue_size must not be negative")


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "tidemill.toml"
    path.write_text(text)
    return path


def test_defaults_hold_when_nothing_is_set() -> None:
    assert load(Settings, "router", None, {}) == Settings()


def test_file_sets_every_kind_of_field(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [router]
        name = "r"
        queue_size = 9
        verbose = true
        mode = "fast"
        level = "high"
        peers = ["a", "b"]
        weights = { x = 1, y = 2.5 }
        limits = { tokens = 7 }
        pools = [{ tokens = 1 }, { share = 1 }]
        [router.tls]
        cert = "certs/router.pem"
        key = "/keys/router.key"
        [cache]
        anything = 1
        """,
    )
    assert load(Settings, "router", path, {}) == Settings(
        name="r",
        queue_size=9,
        verbose=True,
        mode=Mode.FAST,
        level="high",
        peers=("a", "b"),
        weights={"x": 1.0, "y": 2.5},
        limits=Limits(tokens=7),
        pools=(Limits(tokens=1), Limits(share=1.0)),
        tls=Tls(cert=tmp_path / "certs/router.pem", key=Path("/keys/router.key")),
    )


def test_environment_overrides_the_file_field_by_field(tmp_path: Path) -> None:
    path = write(tmp_path, "[router]\nqueue_size = 9\nlimits = { tokens = 7, share = 0.1 }")
    environ = {
        "TIDEMILL_ROUTER_QUEUE_SIZE": "11",
        "TIDEMILL_ROUTER_LIMITS_SHARE": "0.25",
        "TIDEMILL_ROUTER_VERBOSE": "true",
        "TIDEMILL_ROUTER_MODE": "fast",
        "TIDEMILL_ROUTER_PEERS": "a, b",
        "TIDEMILL_ROUTER_WEIGHTS": "x=1,y=2.5",
        "TIDEMILL_ROUTER_TLS_CERT": "c.pem",
        "TIDEMILL_ROUTER_TLS_KEY": "k.pem",
        "TIDEMILL_CACHE_UNRELATED": "1",
        "PATH": "/bin",
    }
    assert load(Settings, "router", path, environ) == Settings(
        queue_size=11,
        limits=Limits(tokens=7, share=0.25),
        verbose=True,
        mode=Mode.FAST,
        peers=("a", "b"),
        weights={"x": 1.0, "y": 2.5},
        tls=Tls(Path("c.pem"), Path("k.pem")),
    )


def test_secret_is_read_from_the_file_that_the_environment_names(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    environ = {"TIDEMILL_ROUTER_SECRET_FILE": str(secret)}
    assert load(Settings, "router", None, environ).secret == "hunter2"


def test_field_that_ends_in_file_is_a_field(tmp_path: Path) -> None:
    environ = {"TIDEMILL_ROUTER_KEY_FILE": "/run/key"}
    assert load(Settings, "router", None, environ).key_file == Path("/run/key")


@pytest.mark.parametrize(
    ("text", "key", "problem"),
    [
        ("[router]\nqueu_size = 1", "router.queu_size", "unknown key"),
        ("[router.limits]\ntoken = 1", "router.limits.token", "unknown key"),
        ('[router]\nqueue_size = "1"', "router.queue_size", "must be a whole number"),
        ("[router]\nqueue_size = true", "router.queue_size", "must be a whole number"),
        ("[router]\nqueue_size = 1.5", "router.queue_size", "must be a whole number"),
        ("[router]\nverbose = 1", "router.verbose", "must be true or false"),
        ("[router]\npeers = 'a'", "router.peers", "must be a list"),
        ("[router]\npeers = ['a', 1]", "router.peers[1]", "must be a string"),
        ("[router]\nlimits = 1", "router.limits", "must be a table"),
        ("[router]\nmode = 'slow'", "router.mode", "must be one of fast, safe"),
        ("[router]\nlevel = 'mid'", "router.level", "must be one of low, high"),
        ("[router.tls]\ncert = 'c'", "router.tls.key", "required"),
        ("[router]\nkey_file = 1", "router.key_file", "must be a path"),
        ("[router]\nqueue_size = -1", "router", "queue_size must not be negative"),
        ("[rooter]", "[router]", "has no section"),
        ("router = 1", "[router]", "has no section"),
        ("[router", "", "not valid TOML"),
    ],
)
def test_bad_file_names_the_key_and_the_file(
    tmp_path: Path, text: str, key: str, problem: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(Settings, "router", path, {})
    assert str(path) in caught.value.message
    assert key in caught.value.message
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("TIDEMILL_ROUTER_QUEU_SIZE", "1", "unknown key"),
        ("TIDEMILL_ROUTER_LIMITS", "1", "unknown key"),
        ("TIDEMILL_ROUTER_QUEUE_SIZE", "many", "must be a whole number"),
        ("TIDEMILL_ROUTER_VERBOSE", "maybe", "must be true or false"),
        ("TIDEMILL_ROUTER_WEIGHTS", "x", "must be key=value pairs"),
        ("TIDEMILL_ROUTER_SECRET_FILE", "/does/not/exist", "No such file"),
        ("TIDEMILL_ROUTER_NOTHING_FILE", "/does/not/exist", "unknown key"),
    ],
)
def test_bad_variable_is_named(name: str, value: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Settings, "router", None, {name: value})
    assert name in caught.value.message
    assert problem in caught.value.message


def test_a_value_and_its_file_cannot_both_be_set() -> None:
    environ = {"TIDEMILL_ROUTER_SECRET": "a", "TIDEMILL_ROUTER_SECRET_FILE": "b"}
    with pytest.raises(ConfigError, match="both TIDEMILL_ROUTER_SECRET and"):
        load(Settings, "router", None, environ)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load(Settings, "router", tmp_path / "absent.toml", {})
