"""A server as tests have it: in a thread, on a free port of this machine."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socket import SO_SNDBUF, SOL_SOCKET
from typing import Any

from sbd_engine import Engine
from sbd_engine.server import listening
from sbd_engine.server.app import Service
from sbd_engine.server.gate import Gate
from sbd_engine.server.model import Model

MESSAGES = [{"role": "user", "content": "Hello the world"}]


@dataclass
class Served:
    engine: Engine
    gate: Gate
    server: listening.Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and what the body holds: JSON, or else text. A body of bytes goes as it
        is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, data, named)
            answer = connection.getresponse()
            text = answer.read().decode()
            told = {name.lower(): value for name, value in answer.getheaders()}
            is_json = "json" in told.get("content-type", "")
            return answer.status, told, json.loads(text) if is_json else text
        finally:
            connection.close()

    def post(self, path: str, **fields: Any) -> Any:
        status, _, answer = self.ask("POST", path, fields)
        assert status == 200, answer
        return answer

    def refuse(self, path: str, **fields: Any) -> Any:
        """The error of a request that is refused with 400."""
        status, _, answer = self.ask("POST", path, fields)
        assert status == 400, answer
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert answer["error"]["type"] == "invalid_request_error"
        return answer["error"]

    def stream(self, path: str, **fields: Any) -> list[Any]:
        """The objects of a stream, which must end as it should."""
        status, _, text = self.ask("POST", path, {**fields, "stream": True})
        assert status == 200, text
        lines = text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def metric(self, name: str, **labels: str) -> float:
        """A metric's value, summed over those labels that are not given."""
        _, _, text = self.ask("GET", "/metrics")
        total = 0.0
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            its, _, rest = head.partition("{")
            if its == name and all(f'{k}="{v}"' in rest for k, v in labels.items()):
                total += float(value)
        return total


@contextmanager
def serve(
    engine: Engine,
    alias: str = "demo",
    parallel: int = 16,
    max_queue: int = 64,
    chat_template: str | None = None,
    send_buffer: int | None = None,
    **settings: Any,
) -> Iterator[Served]:
    gate = Gate(parallel, max_queue)
    model = Model(alias, engine, gate, chat_template)
    server = listening.Server(Service([model], **settings))
    with listening.listen("127.0.0.1", 0) as socket:
        port = socket.getsockname()[1]
        if send_buffer:
            socket.setsockopt(SOL_SOCKET, SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        try:
            until(lambda: server.started)
            yield Served(engine, gate, server, port)
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for what another thread or process does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def together(*calls: Any) -> list[Any]:
    """Runs coroutines side by side."""

    async def all_of() -> list[Any]:
        return await asyncio.gather(*calls)

    return asyncio.run(all_of())
