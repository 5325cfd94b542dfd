"""The server on Ray Serve: replicas of it behind one address.

    serve run sbd_engine.on_ray:app model=model.bin replicas=2

Each replica is a process with an engine of its own, and answers as `sbd-engine serve` does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from ray import serve
from starlette.types import ASGIApp

from .errors import SbdTypeError, SbdValueError, brief
from .parameters import integer, named, unknown
from .ray_cores import threads_here
from .server.settings import Settings

# Of a replica, beside its texts: what asks for its health, models or metrics. Where Ray's limit is
# beyond the server's own, a request too many is refused in OpenAI's form.
_OTHER_REQUESTS = 64
_OWN = {"replicas": int, "max_replicas": int | None}


class Replica:
    """One server. Ray lets its requests end before it drops it."""

    def __init__(self, settings: Settings) -> None:
        if settings.n_threads is None:
            settings.n_threads = threads_here(settings.device)
        self._life = ExitStack()
        self._service = self._life.enter_context(settings.service())
        self._forwards = -1

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._service.app

    async def check_health(self) -> None:
        """Raises where no forward succeeds any more: Ray starts another replica instead."""
        engine = self._service.models[0].engine
        forwards = engine.usage.forwards
        if forwards == self._forwards:  # none since the last time, so none is known to succeed
            await asyncio.to_thread(engine.forward, [0])
        self._forwards = forwards

    def __del__(self) -> None:
        self._life.close()


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve run` starts. arguments: those of Settings, by name; replicas=1; max_replicas:
    Ray starts as many while each has more requests than its engine generates together (parallel).

    A replica has a core, or as many as n_threads; with device cuda a GPU. A config file's
    deployments section may say otherwise, and whatever else Ray knows. Raises SbdError.
    """
    values = {name: _parsed(name, value) for name, value in arguments.items()}
    replicas = integer(named("replicas"), values.pop("replicas", 1), 1)
    most = values.pop("max_replicas", None)
    settings = Settings(**values)
    scale: dict[str, Any] = {"num_replicas": replicas}
    if most is not None:
        scale["num_replicas"] = "auto"
        scale["autoscaling_config"] = {
            "min_replicas": replicas,
            "max_replicas": integer(named("max_replicas"), most, replicas),
            "target_ongoing_requests": settings.parallel,
        }
    deployment = serve.deployment(serve.ingress()(Replica)).options(
        name="sbd-engine",
        max_ongoing_requests=settings.parallel + settings.max_queue + _OTHER_REQUESTS,
        graceful_shutdown_timeout_s=settings.timeout,
        ray_actor_options={
            "num_cpus": settings.n_threads or 1,
            "num_gpus": 1 if settings.device.startswith("cuda") else 0,
        },
        **scale,
    )
    return deployment.bind(settings)


def _parsed(name: str, value: Any) -> Any:
    """Of the type that it has, from a file or the command line, where all are strings."""
    hints = get_type_hints(Settings)
    known = {each.name: hints[each.name] for each in fields(Settings) if each.init} | _OWN
    if name not in known:
        raise SbdTypeError(unknown("argument", name, [*known]))
    if name == "cors_origin" and isinstance(value, str):
        value = value.split()
    kind = TypeAdapter(known[name], config=ConfigDict(coerce_numbers_to_str=True))
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise SbdValueError(f"{named(name)}: {problem}, got {brief(value)}") from None
