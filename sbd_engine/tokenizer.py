"""Text to token ids and back, with the tokenizer that travels in the model file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from .chat import render_chat
from .errors import SbdValueError
from .ggml_tokenizer import tokenizer_from_ggml
from .parameters import TokenIds, check_utf8


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
        self.chat_template: str | None = metadata.get("tokenizer.chat_template")
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

    def decode(self, ids: TokenIds, skip_special_tokens: bool = True) -> str:
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

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The model's chat template over [{"role": ..., "content": ...}]. Its text is encoded with
        `add_bos=False`. Raises SbdValueError where the file has none or the template refuses."""
        if self.chat_template is None:
            raise SbdValueError(
                "this model file has no chat template: give the prompt as plain text"
            )
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        return render_chat(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._special(self.bos_token_id),
            eos_token=self._special(eos),
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat template, for the model to continue."""
        return self.encode(self.apply_chat_template(messages), add_bos=False)

    def _special(self, token: int | None) -> str:
        return "" if token is None else self.backend.id_to_token(token) or ""

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
