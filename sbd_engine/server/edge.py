"""Between the wire and the endpoints: what is let in, how long it may take, and what is noted.

Every request gets an id, an answer in OpenAI's form whatever happens, and a line in the log, which
never has a prompt or a text in it. The body comes whole before an endpoint hears of the request;
when its client leaves, the endpoint is cancelled.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, failed
from .metrics import Metrics

log = logging.getLogger("sbd_engine.server")

OPEN_PATHS = ("/", "/health")  # without a key
_REFUSALS = (401, 403, 408, 413, 429, 503)
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Limits:
    """Bytes of a body; seconds for it to come, and for an answer."""

    body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    request_seconds: float = 600.0


@dataclass
class Visit:
    """A request, as endpoints know it: figures go to its line in the log. send: past everything
    between an endpoint and here."""

    id: str
    send: Send
    began: float = field(default_factory=perf_counter)
    figures: dict[str, Any] = field(default_factory=dict)


class Edge:
    """keys: that let in; none: everybody. cors: origins whose pages may call."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        limits: Limits,
        keys: Sequence[str],
        cors: Sequence[str],
    ) -> None:
        self._app, self._metrics, self._limits = app, metrics, limits
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._cors = cors
        self.active: set[asyncio.Task[None]] = set()  # requests that endpoints have
        self.draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked_id = headers.get(b"x-request-id", b"").decode("latin-1")
        id = asked_id if _ID.fullmatch(asked_id) else secrets.token_hex(12)
        answer = _Answer(send, id)
        scope["visit"] = visit = Visit(id, answer.send)
        try:
            try:
                self._check(scope["path"], headers)
                body = await self._body(headers, receive)
            except ApiError as error:
                await answer.refuse(error)
                return
            await self._serve(scope, body, receive, answer)
        finally:
            self._note(scope, visit, answer)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.draining and path not in ("/health", "/metrics"):
            raise ApiError(
                503, "the server is going down", code="draining", headers={"Retry-After": "5"}
            )
        self._check_origin(headers)
        if self._keys and path not in OPEN_PATHS:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            digest = hashlib.sha256(key.strip()).digest()
            # All of them, so that the time tells nothing.
            known = [hmac.compare_digest(digest, each) for each in self._keys]
            if kind.lower() != b"bearer" or not any(known):
                raise ApiError(
                    401,
                    "expected a key of this server as `Authorization: Bearer KEY`, got "
                    + ("another one" if key else "none"),
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        """A browser lets any page send requests, though not read what comes back."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        host = headers.get(b"host", b"").decode("latin-1")
        if not origin or origin in self._cors or "*" in self._cors:
            return
        if urlsplit(origin).netloc != host:
            raise ApiError(
                403, f"pages of {origin} may not call this server: see --cors-origin", code="origin"
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        most = self._limits.body_bytes
        too_large = ApiError(413, f"expected a body of at most {most} bytes, got more", code="body")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            return await asyncio.wait_for(_whole(receive, most), self._limits.body_seconds)
        except asyncio.TimeoutError:
            seconds = self._limits.body_seconds
            problem = f"the body was not there after {seconds:g} s"
            raise ApiError(408, problem, code="body_timeout") from None
        except OverflowError:
            raise too_large from None

    async def _serve(self, scope: Scope, body: bytes, receive: Receive, answer: _Answer) -> None:
        """The endpoint's answer, as long as there is somebody to take it."""
        gone = asyncio.create_task(_until_gone(receive))

        bodies = [body]

        async def replay() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await asyncio.wait([gone])
            return {"type": "http.disconnect"}

        endpoint = asyncio.create_task(self._answer(scope, replay, answer))
        self.active.add(endpoint)
        try:
            await asyncio.wait([endpoint, gone], return_when=asyncio.FIRST_COMPLETED)
            if not endpoint.done() and not answer.complete:
                answer.left = True
                endpoint.cancel()
            await asyncio.wait([endpoint])
        finally:
            self.active.discard(endpoint)
            endpoint.cancel()
            gone.cancel()

    async def _answer(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("request %s failed", scope["visit"].id)
            if not answer.begun:
                await answer.refuse(failed(error))

    def _note(self, scope: Scope, visit: Visit, answer: _Answer) -> None:
        # A path that is not ours may be anything.
        route = getattr(scope.get("route"), "path", None) or "other"
        status = "left" if answer.left else str(answer.status or "none")
        self._metrics.answers.labels(route, status).inc()
        if answer.status in _REFUSALS:
            self._metrics.refused.labels(status).inc()
        ms = 1e3 * (perf_counter() - visit.began)
        path = scope["path"][:100].encode("unicode_escape").decode()
        figures = "".join(f" {name}={value}" for name, value in visit.figures.items())
        log.info("%s %s %s %.1f ms id=%s%s", scope["method"], path, status, ms, visit.id, figures)


class _Answer:
    """What goes out. left: its client did before its end."""

    def __init__(self, send: Send, id: str) -> None:
        self._send, self._id = send, id
        self.status: int | None = None
        self.complete = self.left = False

    @property
    def begun(self) -> bool:
        return self.status is not None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = (b"x-request-id", self._id.encode())
            message["headers"] = [*message.get("headers", ()), own]
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True

    async def refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **error.headers,
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})


async def _whole(receive: Receive, most: int) -> bytes:
    """Raises OverflowError beyond so many bytes."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "the body ended before its end", code="body")
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise OverflowError
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
