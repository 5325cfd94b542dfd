"""How a model is served, by whatever runs the server: options in, the service out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..chat import read_template
from ..errors import SbdValueError
from ..parameters import integer, named
from ..sizes import parse_size
from ..text_file import read_text

if TYPE_CHECKING:
    from .app import Service

KEY_VARIABLE = "SBD_API_KEY"


@dataclass
class Settings:
    """model: its file; None is the demo model. alias: its name for clients; None is its file's.
    chat_template: a file in place of the model's own. parallel: texts that are generated together;
    max_queue: that wait for it. timeout: seconds of a request in all. The rest as Engine has it.

    The files of template and keys are read at once: where these settings go they are not needed.
    Raises SbdError.
    """

    model: Path | None = None
    alias: str | None = None
    chat_template: Path | None = None
    parallel: int = 16
    max_queue: int = 64
    timeout: float = 600.0
    api_key_file: Path | None = None
    cors_origin: Sequence[str] = ()
    device: str = "auto"
    n_threads: int | None = None
    n_ctx: int | None = None
    kv_dtype: str = "f16"
    draft: Path | None = None
    kv_budget: str | None = None

    template: str | None = field(init=False, repr=False)
    keys: list[str] = field(init=False, repr=False)
    _kv_bytes: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.alias is not None and not self.alias.strip():
            raise SbdValueError(f"expected {named('alias')} as a name, got an empty one")
        integer(named("parallel"), self.parallel, 1)
        integer(named("max_queue"), self.max_queue, 0)
        if not self.timeout > 0:
            raise SbdValueError(f"expected {named('timeout')} as seconds > 0, got {self.timeout}")
        self._kv_bytes = self.template = None
        if self.kv_budget is not None:
            self._kv_bytes = parse_size(named("kv_budget"), self.kv_budget)
        if self.chat_template is not None:
            self.template = read_template(self.chat_template)
        self.keys = _keys(self.api_key_file)

    @property
    def name(self) -> str:
        return self.alias or (self.model.stem if self.model else "demo")

    @contextmanager
    def service(self) -> Iterator[Service]:
        """With the model loaded, for as long as it is open."""
        from ..engine import Engine
        from .app import Service
        from .edge import Limits
        from .gate import Gate
        from .model import Model

        with Engine(
            self.model,
            self.device,
            self.n_threads,
            self.n_ctx,
            self.kv_dtype,
            self.draft,
            self._kv_bytes,
        ) as engine:
            gate = Gate(self.parallel, self.max_queue)
            model = Model(self.name, engine, gate, self.template)
            limits = Limits(request_seconds=self.timeout)
            yield Service([model], limits, self.keys, self.cors_origin)


def _keys(file: Path | None) -> list[str]:
    of_environment = os.environ.get(KEY_VARIABLE)
    if file is not None and of_environment is not None:
        raise SbdValueError(
            f"expected keys from {named('api_key_file')} or {KEY_VARIABLE}, got both"
        )
    if file is None:
        source, text = KEY_VARIABLE, of_environment
    else:
        source, text = str(file), read_text(file)
    keys = [] if text is None else text.split()
    if text is not None and not keys:
        raise SbdValueError(f"{source}: expected a key, got none")
    return keys
