"""`sbd-engine serve`: the engine behind the interface of OpenAI's clients."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SbdValueError
from ..server.settings import KEY_VARIABLE, Settings
from . import options

_SERVER = "Server"


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
    ] = Settings.parallel,
    max_queue: Annotated[
        int,
        typer.Option(
            help="Texts that wait for that, before requests are refused (429).",
            min=0,
            rich_help_panel=_SERVER,
        ),
    ] = Settings.max_queue,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", help="Of a request in all.", min=0.001, rich_help_panel=_SERVER
        ),
    ] = Settings.timeout,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Keys of clients, one a line; or one in the environment, as {KEY_VARIABLE}.",
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
    except ModuleNotFoundError as error:
        raise SbdValueError(
            f"serve needs {error.name}, which is not installed: pip install 'sbd-engine[serve]'"
        ) from None

    settings = Settings(
        model=options.one_model(model, model_flag),
        alias=alias,
        chat_template=chat_template,
        parallel=parallel,
        max_queue=max_queue,
        timeout=timeout,
        api_key_file=api_key_file,
        cors_origin=cors_origin or (),
        device=device,
        n_threads=threads,
        n_ctx=n_ctx,
        kv_dtype=kv_dtype,
        draft=draft,
        kv_budget=kv_budget,
    )
    listening.allow_files()
    with listening.listen(host, port) as socket, settings.service() as service:
        name = settings.name
        if service.models[0].chat_template is None:
            options.note(f"{name} has no chat template: it completes texts, and refuses chats")
        if not settings.keys and host not in ("127.0.0.1", "::1", "localhost"):
            options.note("without --api-key-file whoever reaches this port may use it")

        _log_to_standard_error()

        def tell() -> None:
            log = logging.getLogger("sbd_engine.server")
            log.info("serving %s at %s (Ctrl-C ends)", name, listening.address_of(socket))

        listening.Server(service, tell).run([socket])
    return 0


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("sbd_engine.server")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
