"""A TCP relay with a long wire: what goes in comes out unchanged, some milliseconds later."""

import queue
import socket
import threading
import time

_READ_BYTES = 1 << 18


class DelayLink:
    """Passes connections to loopback's `target_port` on, each way `delay_s` late.

    As much as is sent may be under way at once, as on a wide and long wire.
    """

    def __init__(self, target_port: int, delay_s: float) -> None:
        self._target_port = target_port
        self._delay_s = delay_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those there are end by themselves."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target_port))
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((near, far), (far, near)):
                wire: queue.Queue[tuple[float, bytes]] = queue.Queue()
                threading.Thread(target=self._send, args=(ends[0], wire), daemon=True).start()
                threading.Thread(target=_deliver, args=(wire, ends[1]), daemon=True).start()

    def _send(self, source: socket.socket, wire: "queue.Queue[tuple[float, bytes]]") -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(_READ_BYTES)
            except OSError:
                data = b""
            wire.put((time.monotonic() + self._delay_s, data))


def _deliver(wire: "queue.Queue[tuple[float, bytes]]", sink: socket.socket) -> None:
    while True:
        due, data = wire.get()
        time.sleep(max(due - time.monotonic(), 0))
        try:
            if not data:
                sink.shutdown(socket.SHUT_WR)
                return
            sink.sendall(data)
        except OSError:
            return
