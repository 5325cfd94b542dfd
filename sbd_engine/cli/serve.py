"""`sbd-engine serve`: the engine behind the interface of OpenAI's clients."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SbdValueError
from ..text_file import read_text
from . import options
from .prompt import read_template

_SERVER, _KEY_VARIABLE = "Server", "SBD_API_KEY"


def serve(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    host: Annotated[
        str, typer.Option(help="Where it listens; 0.0.0.0: everywhere.", rich_help_panel=_SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="0: any that is free.", min=0, max=65535, rich_help_panel=_SERVER)
    ] = 8080,
    alias: Annotated[
        str | None,
        typer.Option(
            help="The model's name for clients; without: its file's.", rich_help_panel=_SERVER
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A chat template in place of the model file's.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(help="Texts that are generated together.", min=1, rich_help_panel=_SERVER),
    ] = 16,
    max_queue: Annotated[
        int,
        typer.Option(
            help="Texts that wait for that, before requests are refused (429).",
            min=0,
            rich_help_panel=_SERVER,
        ),
    ] = 64,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Of a request in all.", min=0.001, rich_help_panel=_SERVER
        ),
    ] = 600.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Keys of clients, one a line; or one in the environment, as {_KEY_VARIABLE}.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Lets pages of this origin call, such as https://example.org; may be repeated.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    n_ctx: options.NCtx = None,
    kv_dtype: options.KvDtype = "f16",
    draft: options.Draft = None,
    kv_budget: options.KvBudget = None,
    debug: options.Debug = False,
) -> int:
    """Serve a model to OpenAI's clients, and a page to chat with it.

    Ctrl-C or SIGTERM lets running requests end, a second one does not.
    """
    try:
        from ..server import listening
        from ..server.app import Service
        from ..server.edge import Limits
        from ..server.gate import Gate
        from ..server.model import Model
    except ModuleNotFoundError as error:
        raise SbdValueError(
            f"serve needs {error.name}, which is not installed: pip install 'sbd-engine[serve]'"
        ) from None
    from ..engine import Engine

    if alias is not None and not alias.strip():
        raise SbdValueError("expected --alias as a name, got an empty one")
    file = options.one_model(model, model_flag)
    keys = _keys(api_key_file)
    template = None if chat_template is None else read_template(chat_template)
    budget = options.in_bytes(kv_budget)
    _log_to_standard_error()
    listening.allow_files()
    with (
        listening.listen(host, port) as socket,
        Engine(file, device, threads, n_ctx, kv_dtype, draft, budget) as engine,
    ):
        name = alias or ("demo" if file is None else file.stem)
        served = Model(name, engine, Gate(parallel, max_queue), template)
        if served.chat_template is None:
            options.note(f"{name} has no chat template: it completes texts, and refuses chats")
        if not keys and host not in ("127.0.0.1", "::1", "localhost"):
            options.note("without --api-key-file whoever reaches this port may use it")
        limits = Limits(request_seconds=timeout)
        service = Service([served], limits, keys, cors_origin or ())

        def tell() -> None:
            log = logging.getLogger("sbd_engine.server")
            log.info("serving %s at %s (Ctrl-C ends)", name, listening.address_of(socket))

        listening.Server(service, tell).run([socket])
    return 0


def _keys(file: Path | None) -> list[str]:
    of_environment = os.environ.get(_KEY_VARIABLE)
    if file is not None and of_environment is not None:
        raise SbdValueError(f"expected keys from --api-key-file or {_KEY_VARIABLE}, got both")
    if file is None:
        source, text = _KEY_VARIABLE, of_environment
    else:
        source, text = str(file), read_text(file)
    keys = [] if text is None else text.split()
    if text is not None and not keys:
        raise SbdValueError(f"{source}: expected a key, got none")
    return keys


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("sbd_engine.server")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
