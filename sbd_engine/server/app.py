"""The endpoints."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import SbdError
from . import fields, metrics
from .answers import Answer
from .calls import CallSplitter, with_calls
from .choices import ChatChoice, CompletionChoice
from .edge import Edge, Limits, Visit
from .errors import ApiError, failed
from .fields import Asked
from .model import Model
from .texts import Task
from .thinking import ThinkingSplitter

_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LARGE_BODY = 1 << 16  # is parsed beside the event loop
_SEED_BITS = 53  # that a client's JSON keeps, whatever its language

Endpoint = Callable[[Request], Awaitable[Response]]
MakeAnswer = Callable[[Model, Asked, Visit], Awaitable[Answer]]


class Service:
    """Models behind one address; the first is the one where none is named.

    keys: one of which clients must have, if there are any. cors: origins of other pages.
    """

    def __init__(
        self,
        models: Sequence[Model],
        limits: Limits | None = None,
        keys: Sequence[str] = (),
        cors: Sequence[str] = (),
    ) -> None:
        self.models = models
        self._models = {model.alias: model for model in models}
        self._limits = limits or Limits()
        self._metrics = metrics.Metrics()
        self._metrics.registry.register(metrics.Gauges(models))
        self.edge = Edge(self._routes(), self._metrics, self._limits, keys, cors)
        self.app: ASGIApp = self.edge
        if cors:
            self.app = CORSMiddleware(
                self.edge,
                allow_origins=list(cors),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id"],
            )

    def _routes(self) -> FastAPI:
        app = FastAPI(openapi_url=None)  # its pages load from other hosts
        endpoints: dict[str, tuple[str, Endpoint]] = {
            "/v1/chat/completions": ("POST", self.chat),
            "/v1/completions": ("POST", self.complete),
            "/v1/models": ("GET", self.list_models),
            "/v1/models/{name:path}": ("GET", self.one_model),
            "/tokenize": ("POST", self.tokenize),
            "/detokenize": ("POST", self.detokenize),
            "/tokenizer_info": ("GET", self.tokenizer_info),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.show_metrics),
            "/": ("GET", self.page),
        }
        for path, (method, endpoint) in endpoints.items():
            app.add_api_route(path, endpoint, methods=[method], response_model=None)
        app.add_exception_handler(ApiError, _answer_error)
        app.add_exception_handler(HTTPException, _answer_http_error)
        app.add_exception_handler(SbdError, _answer_fault)
        app.add_exception_handler(Exception, _answer_fault)
        return app

    # ---- texts ----

    async def chat(self, request: Request) -> Response:
        body = await _body(request)
        return await self._answer(request, fields.asked_of_chat(body, _seed()), self._chat)

    async def complete(self, request: Request) -> Response:
        body = await _body(request)
        return await self._answer(
            request, fields.asked_of_completion(body, _seed()), self._complete
        )

    async def _answer(self, request: Request, asked: Asked, make: MakeAnswer) -> Response:
        model = self._model(asked.model)
        visit: Visit = request.scope["visit"]
        if asked.stream:
            lines = self._stream(model, asked, visit, make)
            return EventStream(await anext(lines), lines)
        with model.gate.entry(asked.n_texts) as entry:
            answer = await make(model, asked, visit)
            try:
                return JSONResponse(await answer.whole(entry))
            finally:
                visit.figures |= answer.figures()

    async def _stream(
        self, model: Model, asked: Asked, visit: Visit, make: MakeAnswer
    ) -> AsyncGenerator[bytes, None]:
        assert asked.stream
        with model.gate.entry(asked.n_texts) as entry:
            answer = await make(model, asked, visit)
            try:
                async with aclosing(answer.stream(asked.stream, entry)) as lines:
                    async for line in lines:
                        yield line
            finally:
                visit.figures |= answer.figures()

    async def _chat(self, model: Model, asked: Asked, visit: Visit) -> Answer:
        given = asked.tools.given if asked.tools else None
        prompt = await model.encode_chat(asked.messages, asked.template_arguments, given)
        begun = model.begins_thinking(prompt)
        form = None
        if asked.tools and asked.tools.functions:
            form = model.call_format()
            asked = with_calls(asked, asked.tools, form, model, begun)
        most = asked.max_tokens or model.most_tokens(len(prompt), asked.arguments.get("block_size"))
        task = await self._task(model, asked, [prompt], [most], "messages")
        choices = [
            ChatChoice(
                index,
                model.piece,
                ThinkingSplitter(begun) if model.thinks else None,
                CallSplitter(form, asked.tools.required) if form and asked.tools else None,
            )
            for index in range(asked.n)
        ]
        return Answer("chat.completion", f"chatcmpl-{visit.id}", task, choices)

    async def _complete(self, model: Model, asked: Asked, visit: Visit) -> Answer:
        prompts = [await model.encode(prompt, "prompt") for prompt in asked.prompts]
        assert asked.max_tokens is not None
        most = [asked.max_tokens] * len(prompts)
        task = await self._task(model, asked, prompts, most, "prompt")
        echoes = [""] * len(prompts)
        if asked.echo:
            echoes = [
                given if isinstance(given, str) else model.tokenizer.decode(given, False)
                for given in asked.prompts
            ]
        choices = [
            CompletionChoice(index, model.piece, echoes[index // asked.n])
            for index in range(task.n_texts)
        ]
        return Answer("text_completion", f"cmpl-{visit.id}", task, choices)

    async def _task(
        self,
        model: Model,
        asked: Asked,
        prompts: list[list[int]],
        max_tokens: list[int],
        param: str,
    ) -> Task:
        watch = metrics.Watch(self._metrics, model.alias)
        seconds = self._limits.request_seconds
        task = Task(model, asked, prompts, max_tokens, param, seconds, watch)
        if asked.constraint is None:
            task.check()
        else:  # it may take long to compile
            await asyncio.to_thread(task.check)
        return task

    # ---- models and tokens ----

    async def list_models(self, request: Request) -> Response:
        models = [model.described() for model in self._models.values()]
        return JSONResponse({"object": "list", "data": models})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._model(request.path_params["name"]).described())

    async def tokenize(self, request: Request) -> Response:
        values = fields.read(await _body(request), fields.TOKENIZE_FIELDS)
        model = self._model(values.get("model"))
        if ("prompt" in values) == ("messages" in values):
            raise ApiError(400, "expected one of `prompt` and `messages`", "prompt")
        if "messages" in values:
            arguments, tools = values.get("chat_template_kwargs", {}), values.get("tools")
            tokens = await model.encode_chat(values["messages"], arguments, tools or None)
        else:
            add_bos = values.get("add_special_tokens", True)
            tokens = await model.encode(values["prompt"], "prompt", add_bos)
        n_ctx = model.engine.n_ctx
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": n_ctx})

    async def detokenize(self, request: Request) -> Response:
        values = fields.read(await _body(request), fields.DETOKENIZE_FIELDS)
        model = self._model(values.get("model"))
        if "tokens" not in values:
            raise ApiError(400, "expected a field `tokens`, got none", "tokens")
        model.check_tokens(values["tokens"], "tokens")
        text = await asyncio.to_thread(model.tokenizer.decode, values["tokens"], False)
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        return JSONResponse(self._model(request.query_params.get("model")).tokenizer_info())

    # ---- operators and people ----

    async def health(self, request: Request) -> Response:
        if self.edge.draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        page = files(__package__) / "page.html"
        if not page.is_file():
            raise ApiError(404, "this server has no page")
        headers = {"Content-Security-Policy": _PAGE_POLICY}
        return Response(page.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    def _model(self, name: str | None) -> Model:
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}: expected {' or '.join(self._models)}",
                "model",
                "model_not_found",
            )
        return self._models[name]


class EventStream(Response):
    """A stream of server-sent events; `first` has come already."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, lines: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._lines = first, lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # A task of its own, and the shortest way out: a forward's time between two lines leaves
            # no cache warm for the twenty calls that routes and middleware are.
            await asyncio.create_task(self._send_lines(scope["visit"].send))

    async def _send_lines(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for line in self._lines:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _body(request: Request) -> dict[str, Any]:
    data = await request.body()
    if len(data) > _LARGE_BODY:
        return await asyncio.to_thread(fields.parse_body, data)
    return fields.parse_body(data)


def _seed() -> int:
    return secrets.randbits(_SEED_BITS)


def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


def _answer_fault(_: Request, error: Exception) -> Response:
    told = failed(error)
    return JSONResponse(told.body(), told.status, told.headers)


def _answer_http_error(request: Request, error: Exception) -> Response:
    """Of a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    message = {404: f"there is nothing at {path!r}", 405: f"{path} is not for {request.method}"}
    told = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
    return JSONResponse(told.body(), error.status_code, error.headers)
