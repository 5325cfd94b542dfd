"""A model that is served: its engine, and what the endpoints need to know of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..engine import Engine
from ..errors import SbdError
from ..parameters import token_ids
from ..tools import CallFormat, format_of, knows_tools
from .errors import TOO_LONG, ApiError, refused
from .gate import Gate

_THINKING_TOKENS = 8  # of a prompt's end, where a template may have begun the thinking


class Model:
    """alias: the name that clients ask for. chat_template: one in place of the file's own."""

    def __init__(
        self, alias: str, engine: Engine, gate: Gate, chat_template: str | None = None
    ) -> None:
        self.alias, self.engine, self.gate = alias, engine, gate
        self.created = int(time.time())
        self.tokenizer = engine.tokenizer
        self._template = chat_template
        self.piece = lru_cache(maxsize=1 << 16)(self.tokenizer.piece)

    @property
    def chat_template(self) -> str | None:
        return self._template or self.tokenizer.chat_templates.get("default")

    @property
    def thinks(self) -> bool:
        """Whether its answers may begin with what it thinks, in tags."""
        return "</think>" in (self.chat_template or "")

    def begins_thinking(self, prompt: Sequence[int]) -> bool:
        end = self.tokenizer.decode(prompt[-_THINKING_TOKENS:], skip_special_tokens=False)
        return self.thinks and end.rstrip().endswith("<think>")

    def described(self) -> dict[str, Any]:
        """In the list of models."""
        return {
            "id": self.alias,
            "object": "model",
            "created": self.created,
            "owned_by": "sbd-engine",
            "max_model_len": self.engine.n_ctx,
            "sbd": {
                "chat": self.chat_template is not None,
                "decoder": self.engine.auto_decoder,
                "decoders": self.engine.decoders,
                "options": {k: v for k, v in self.engine.defaults.items() if v is not None},
            },
        }

    async def encode(self, prompt: str | list[int], param: str, add_bos: bool = True) -> list[int]:
        """A prompt's token ids. Raises ApiError."""
        if not isinstance(prompt, str):
            return prompt
        n_ctx = self.engine.n_ctx  # of an engine that has closed: no fault of the client's
        try:
            return await asyncio.to_thread(self.tokenizer.encode, prompt, add_bos, n_ctx)
        except SbdError as error:
            raise refused(error, param) from None

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """A conversation's. Raises ApiError."""
        if self.chat_template is None:
            raise ApiError(
                400,
                f"the model {self.alias} has no chat template: ask for a completion, or start the "
                "server with --chat-template FILE",
                "messages",
                "no_chat_template",
            )

        if tools and not knows_tools(self._tool_template):
            raise ApiError(
                400, f"the chat template of the model {self.alias} knows no tools", "tools"
            )
        n_ctx = self.engine.n_ctx

        def encode() -> list[int]:
            return self.tokenizer.encode_chat(
                messages, tools=tools, chat_template=self._template, fits=n_ctx, **arguments
            )

        try:
            return await asyncio.to_thread(encode)
        except SbdError as error:
            raise refused(error, "messages") from None

    def call_format(self) -> CallFormat:
        """How it writes calls. Raises ApiError."""
        form = format_of(self._tool_template)
        if form is None:
            raise ApiError(
                400,
                f"the chat template of the model {self.alias} writes calls in a form that is not "
                'known here: its `tool_choice` can be "none" only',
                "tools",
            )
        return form

    @property
    def _tool_template(self) -> str:
        """The one where there are tools."""
        named = self.tokenizer.chat_templates.get("tool_use")
        return self._template or named or self.chat_template or ""

    def most_tokens(self, prompt_tokens: int, block_size: int | None) -> int:
        """The new tokens that there is room for behind a prompt, the last in a block."""
        engine = self.engine
        room = engine.n_ctx
        if engine.kv_positions < room:
            room = engine.kv_positions - (block_size or engine.defaults["block_size"] or 1)
        return max(1, room - prompt_tokens)

    def tokenizer_info(self) -> dict[str, Any]:
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_ids
        named = {
            "bos_token": tokenizer.bos_token_id,
            "eos_token": eos[0] if eos else None,
            "mask_token": tokenizer.mask_token_id,
        }
        to_text = tokenizer.backend.id_to_token
        return {
            **{name: None if id_ is None else to_text(id_) for name, id_ in named.items()},
            "eos_token_ids": eos,
            "vocab_size": self.engine.model_config["vocab_size"],
            "model_max_length": self.engine.n_ctx,
            "chat_template": self.chat_template,
        }

    def check_tokens(self, tokens: Sequence[int], param: str) -> None:
        """Raises ApiError."""
        try:
            token_ids(tokens, self.engine.model_config["vocab_size"])
        except SbdError as error:
            raise refused(error, param) from None

    def check_length(self, prompt: Sequence[int], room: int, param: str) -> None:
        """room: tokens behind the prompt that there must be place for. Raises ApiError."""
        most = self.engine.n_ctx - room
        if len(prompt) > most:
            raise ApiError(
                400,
                f"expected a prompt of at most {most} tokens, as the context holds "
                f"{self.engine.n_ctx}, got {len(prompt)}: shorten it",
                param,
                TOO_LONG,
            )
