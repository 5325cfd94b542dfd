"""The server's life: listening, draining, ending."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import SbdFileError
from .app import Service
from .errors import ApiError

_PATIENCE_SECONDS = 30.0  # with a connection on which nothing happens
_BACKLOG = 2048
_FILES = 1 << 16  # that may be open: a connection each


def listen(host: str, port: int) -> socket.socket:
    """Raises SbdFileError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise SbdFileError(
            f"cannot listen at --host {host} --port {port}: {error.strerror}"
        ) from None
    return listening


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def allow_files() -> None:
    """As many as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Server(uvicorn.Server):
    """The first signal lets nobody in and ends with the last request, a second one at once.

    started: called once requests are answered.
    """

    def __init__(self, service: Service, started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                service.app,
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=_BACKLOG,
                timeout_keep_alive=int(_PATIENCE_SECONDS),
                log_level="critical",  # what there is to say the edge says
            )
        )
        self._edge, self._tell = service.edge, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._edge.draining:
            self.should_exit = self.force_exit = True
        self._edge.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._edge.draining and not self._edge.active:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for request in list(self._edge.active):  # a second signal's
            request.cancel()
        await super().shutdown(sockets)


class Connection(H11Protocol):
    """One that does not stay open for nothing, and says in OpenAI's form what is no HTTP.

    It is looked at from time to time, and ends where nothing has happened since: no request has
    come, or not whole, or the client has taken nothing of what waits for it.
    """

    _timer: asyncio.TimerHandle | None = None
    _taken = 0  # times that the client caught up

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        self._taken += 1
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, msg).body())
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%s" % (len(body), body.encode())
        )
        self.transport.close()

    def _look_later(self) -> None:
        idle = self.cycle is None or self.cycle.response_complete
        seen = (self.cycle, idle, self._taken)
        self._timer = self.loop.call_later(_PATIENCE_SECONDS, self._look, *seen)

    def _look(self, cycle: object, idle: bool, taken: int) -> None:
        without_request = idle and self.cycle is cycle
        without_reader = self._taken == taken and (
            self.flow.write_paused or self.transport.is_closing()
        )
        if without_request or without_reader:
            self.transport.abort()
        else:
            self._look_later()
