import socket
from pathlib import Path

from services.stack.ports import free_port, free_ports


def test_neighbouring_ports_are_all_free() -> None:
    first = free_ports(4)
    for port in range(first, first + 4):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_port_is_handed_out_once_though_nobody_listens_on_it_yet() -> None:
    ports = [free_port() for _ in range(300)]
    assert len(set(ports)) == 300


def test_no_outgoing_connection_is_given_one() -> None:
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    lowest, _ = map(int, outgoing.split())
    assert all(free_port() < lowest for _ in range(100))


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", free_port() + 8))
        assert free_port() != listener.getsockname()[1]
