from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from tests.redis_process import RedisProcess

pytestmark = pytest.mark.redis


def test_only_the_acl_user_gets_in(redis_server: Callable[..., RedisProcess]) -> None:
    server = redis_server(maxmemory_policy="allkeys-lru")
    with redis.Redis.from_url(server.url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
    with (
        redis.Redis(port=server.port) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_a_killed_server_comes_back_on_its_port_with_its_append_only_file(
    redis_server: Callable[..., RedisProcess],
) -> None:
    server = redis_server(appendonly="yes", appendfsync="always")
    with redis.Redis.from_url(server.url) as client:
        client.set("tm:test", "kept")
    server.kill()
    with redis.Redis.from_url(server.url) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    server.start()
    with redis.Redis.from_url(server.url) as client:
        assert client.get("tm:test") == b"kept"


def test_the_packaged_server_serves_where_path_has_none(
    tmp_path: Path, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    server = RedisProcess(tmp_path, port=free_port(), settings={})
    server.start()
    try:
        with redis.Redis.from_url(server.url) as client:
            assert "valkey_version" in client.info("server")
    finally:
        server.stop()
