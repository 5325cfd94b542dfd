"""Text to token ids and back, with the tokenizer that travels in the model file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from .chat import ChatTemplates, Message, named_tokens
from .errors import SbdValueError
from .ggml_tokenizer import tokenizer_from_ggml
from .parameters import check_utf8
from .special_tokens import SpecialTokens
from .spelled_tokens import SpelledTokens


class Tokenizer:
    """The file's `tokenizer.huggingface.json` as it is, else one built from `tokenizer.ggml.*`.

    `bos_token_id`, `eos_token_ids` and `mask_token_id` are the model's. Raises SbdValueError where
    the metadata describe no tokenizer that can be built.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        eos_token_ids: Sequence[int] = (),
        mask_token_id: int | None = None,
    ) -> None:
        self.backend = _build(metadata)
        self.bos_token_id: int | None = metadata.get("tokenizer.ggml.bos_token_id")
        self.eos_token_ids = list(eos_token_ids)
        self.mask_token_id = mask_token_id
        self.special_tokens = SpecialTokens(self.backend)
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        names = named_tokens(metadata, self.backend.id_to_token, eos)
        self._chat = ChatTemplates(metadata, names)
        # What the text of every prompt begins with.
        self._prefix = self._leading_ids(metadata.get("tokenizer.ggml.add_bos_token"))

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; BOS is put in front where the tokenizer says so, unless the text
        begins with it or `add_bos` is False (a chat template writes its own)."""
        check_utf8("text", text)
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        if add_bos and self._prefix and ids[: len(self._prefix)] != self._prefix:
            return self._prefix + ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no character become U+FFFD."""
        text: str = self.backend.decode(
            [int(token) for token in ids], skip_special_tokens=skip_special_tokens
        )
        return text

    def piece(self, token: int) -> str:
        """The text that one token adds behind another, with the space before a word."""
        once = self.decode([token], skip_special_tokens=False)
        twice = self.decode([token, token], skip_special_tokens=False)
        return twice[len(once) :]

    @cached_property
    def spaces_words(self) -> bool:
        """Whether decoding puts a space between words that have none of their own."""
        word = self.encode("a", add_bos=False)
        return len(self.decode(word * 2)) > 2 * len(self.decode(word))

    @property
    def chat_templates(self) -> dict[str, str]:
        """The file's chat templates by name; "default" is the one where none is named."""
        return dict(self._chat.templates)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        **template_arguments: Any,
    ) -> str:
        """The text of [{"role": ..., "content": ...}] in the model's chat template, as transformers
        gives it; encode_chat has its tokens.

        tools, documents: dicts, for templates that know them. chat_template: the name of one where
        the file has several, or a template; None is "tool_use" with tools where there is one, else
        "default". template_arguments: what else the template takes, such as enable_thinking=False.

        Raises SbdValueError where the file has no template, or it refuses or spends too much.
        """
        return self._chat.conversation(
            messages, tools, documents, chat_template, add_generation_prompt, template_arguments
        ).text()

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        sanitize_control_tokens: bool = True,
        **template_arguments: Any,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, for the model to continue.

        Arguments are apply_chat_template's. A special token that is spelled out in what the caller
        gives stays text, only those that the template writes become tokens;
        sanitize_control_tokens=False makes tokens of all, as transformers does by default.
        """
        conversation = self._chat.conversation(
            messages, tools, documents, chat_template, add_generation_prompt, template_arguments
        )
        if sanitize_control_tokens:
            return self._spelled.encode(conversation)
        return self._encode_chat_text(conversation.text())

    def _encode_chat_text(self, text: str) -> list[int]:
        return self.encode(text, add_bos=False)

    @cached_property
    def _spelled(self) -> SpelledTokens:
        return SpelledTokens(self.backend, self.special_tokens, self._encode_chat_text)

    def _leading_ids(self, add_bos_token: bool | None) -> list[int]:
        if add_bos_token is None:  # the tokenizer's own post-processor decides
            leading = self.backend.encode("", add_special_tokens=True).ids
            return [token for token in leading if token not in self.eos_token_ids]
        if add_bos_token and self.bos_token_id is not None:
            return [self.bos_token_id]
        return []


def _build(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    source = metadata.get("tokenizer.huggingface.json")
    if source is None:
        return tokenizer_from_ggml(metadata)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises a bare Exception
        raise SbdValueError(
            f"tokenizer.huggingface.json: expected a tokenizer, got one that does not load: {error}"
        ) from None
    # Limits that training left in the file would cut or pad prompts.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
