"""A uvicorn server that finishes the requests under way before it stops."""

from __future__ import annotations

import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from unified_mm.serving.gate import Traffic

LAST_SECONDS = 1  # for requests that are cut off to be told so


class DrainingServer(uvicorn.Server):
    """A server that finishes the requests under way before it stops.

    On SIGTERM or Ctrl-C it refuses new requests (503), finishes those under way, then ends. A
    second signal ends it at once.

    Args:
      traffic: the requests under way, as the gate counts them.
      seconds: the time that they are given to finish.
    """

    def __init__(self, app: ASGIApp, traffic: Traffic, seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                access_log=False,
                proxy_headers=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=LAST_SECONDS,
            )
        )
        self._traffic = traffic
        self._seconds = seconds
        self._signal = 0
        self._until = 0.0
        self._cut = 0

    @property
    def exit_code(self) -> int:
        """The exit code: 0 if everything was finished, else 128 + the signal's number."""
        return 128 + self._signal if self._cut else 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts to drain on the first signal; ends the server on the second."""
        if self._traffic.draining:
            self._cut = self._traffic.under_way
            self.should_exit = self.force_exit = True
            return
        self._signal, self._until = sig, time.monotonic() + self._seconds
        self._traffic.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end; uvicorn asks ten times a second."""
        ends = await super().on_tick(counter)
        if ends or not self._traffic.draining:
            return ends
        if self._traffic.under_way and time.monotonic() < self._until:
            return False
        self._cut = self._traffic.under_way
        return True


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address; port 0 takes a free one.

    Raises:
      ValueError: a port out of range, or an address that cannot be bound.
    """
    host = host.strip("[]")
    if not 0 <= port < 2**16:
        raise ValueError(f"--port={port}: must be from 0 (a free one) to {2**16 - 1}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--host={host}: {error.strerror or error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        why = error.strerror or error
        raise ValueError(f"cannot listen at {host}:{port}: {why}; choose another --port") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Returns the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
