"""Network addresses as they stand in configuration: `host:port`, `unix:path` or `dns:///host:port`.

The last is for clients, where a name stands for several routers.
"""

import ipaddress

from tidemill.errors import ConfigError


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Raises ConfigError for anything else."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"address {address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_name_of_many(target: str) -> bool:
    """Whether `target` asks for every address of a name, `dns:///host:port`."""
    return target.startswith("dns:")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches `address`. A name other than localhost is not trusted,
    nor what a name server of the address's own choice (`dns://server/host:port`) says.
    """
    if address.startswith("unix:"):
        return True
    host, _ = split_address(address.removeprefix("dns:///"))
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
