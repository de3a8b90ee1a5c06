"""A TCP relay that can be made slow: a thin wire between two real processes."""

import select
import socket
import threading
import time

_BUFFER_BYTES = 16_384
_TICK_S = 0.01


class SlowLink:
    """Listens on `port` of loopback and passes connections on to `target_port`.

    `bytes_per_s` bounds what the far side sends on each connection; None does not. What is on the
    wire when an end dies still arrives, unless the wire is `cut` as well.
    """

    def __init__(self, port: int, target_port: int) -> None:
        self.port = port
        self.bytes_per_s: float | None = None
        self._target_port = target_port
        self._closing = False
        self._num_cuts = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        # Small, so that the wire holds little; accepted connections inherit it.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def cut(self) -> None:
        """Drop every connection and what it carries; later ones are passed on."""
        self._num_cuts += 1

    def close(self) -> None:
        """Hang up on all and stop listening."""
        self._closing = True
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            if not select.select([self._listener], [], [], 0.1)[0]:
                continue
            near, _ = self._listener.accept()
            thread = threading.Thread(target=self._relay, args=(near,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _relay(self, near: socket.socket) -> None:
        with near:
            try:
                with socket.socket() as far:
                    # Before connecting: the window is agreed upon then.
                    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
                    far.connect(("127.0.0.1", self._target_port))
                    self._shuttle(near, far)
            except OSError:
                return  # an end that is gone: closing both tells the other

    def _shuttle(self, near: socket.socket, far: socket.socket) -> None:
        allowance, last = 0.0, time.monotonic()
        num_cuts = self._num_cuts
        while not self._closing and num_cuts == self._num_cuts:
            rate, now = self.bytes_per_s, time.monotonic()
            allowance = _BUFFER_BYTES if rate is None else allowance + rate * (now - last)
            allowance, last = min(allowance, _BUFFER_BYTES), now
            sources = [near, far] if allowance >= 1 else [near]
            for source in select.select(sources, [], [], _TICK_S)[0]:
                most = _BUFFER_BYTES if source is near else int(allowance)
                data = source.recv(most)
                if not data:
                    return
                if source is far:
                    allowance -= len(data)
                (far if source is near else near).sendall(data)
