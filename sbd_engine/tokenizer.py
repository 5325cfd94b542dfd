"""Text to token ids and back, with the tokenizer that travels in the model file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any

from tokenizers import decoders

from .chat import ChatTemplates, Message, named_tokens
from .convert.guarded import GuardedTokenizer
from .errors import SbdLengthError, SbdValueError, brief
from .ggml_tokenizer import adds_bos, tokenizer_from_ggml
from .parameters import TokenIds, check_utf8
from .special_tokens import SpecialTokens
from .spelled_tokens import SpelledTokens

_HF_KEY = "tokenizer.huggingface.json"
# A longer text is refused before it is looked at: no prompt has that many characters a token.
_MOST_CHARACTERS_A_TOKEN = 256
_KNOWN_TOKENS = 1 << 16  # whose text is kept, once it was asked for
_FIRST_CHARACTERS = 4096  # of a text whose length in tokens is limited, and 16 more a token


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
        # SentencePiece's second token is BOS where nothing says otherwise.
        usual = 1 if metadata.get("tokenizer.ggml.model") == "llama" else None
        self.bos_token_id: int | None = metadata.get("tokenizer.ggml.bos_token_id", usual)
        if type(self.bos_token_id) not in (int, type(None)):
            raise SbdValueError(
                f"tokenizer.ggml.bos_token_id: expected a token id, got {brief(self.bos_token_id)}"
            )
        self.eos_token_ids = list(eos_token_ids)
        self.mask_token_id = mask_token_id
        self._decode_one = lru_cache(_KNOWN_TOKENS)(partial(_decode_one, self.backend))
        self.special_tokens = SpecialTokens(self.backend)
        eos = self.eos_token_ids[0] if self.eos_token_ids else None
        names = named_tokens(metadata, self.backend.id_to_token, eos)
        self._chat = ChatTemplates(metadata, names)
        # What the text of every prompt begins with.
        self._prefix = self._leading_ids(metadata)

    def encode(self, text: str, add_bos: bool = True, fits: int | None = None) -> list[int]:
        """Token ids of `text`; BOS is put in front where the tokenizer says so, unless the text
        begins with it or `add_bos` is False (a chat template writes its own).

        Raises SbdLengthError where the text has many more than `fits` tokens, without encoding it
        all: a megabyte takes one to three seconds and up to 650 MB.
        """
        check_utf8("text", text)
        self._check_length(text, fits)
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        if add_bos and self._prefix and ids[: len(self._prefix)] != self._prefix:
            return self._prefix + ids
        return ids

    def decode(self, ids: TokenIds, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no character become U+FFFD."""
        if len(ids) == 1:  # as a text that grows asks for again and again
            return self._decode_one(int(ids[0]), skip_special_tokens)
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

    @cached_property
    def joins_bytes(self) -> bool:
        """Whether decoding is joining the bytes of tokens, and no more: any two texts that are
        whole, put together, are that of their tokens."""
        return isinstance(self.backend.decoder, decoders.ByteLevel)

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
        fits: int | None = None,
        **template_arguments: Any,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, for the model to continue.

        Arguments are apply_chat_template's. A special token that is spelled out in what the caller
        gives stays text, only those that the template writes become tokens;
        sanitize_control_tokens=False makes tokens of all, as transformers does by default. fits: as
        encode has it, of the conversation's text.
        """
        conversation = self._chat.conversation(
            messages, tools, documents, chat_template, add_generation_prompt, template_arguments
        )
        if sanitize_control_tokens:
            return self._spelled.encode(conversation, partial(self._check_length, fits=fits))
        return self.encode(conversation.text(), add_bos=False, fits=fits)

    @cached_property
    def _spelled(self) -> SpelledTokens:
        return SpelledTokens(self.backend, self.special_tokens)

    def _check_length(self, text: str, fits: int | None) -> None:
        """Of the text's beginning, then of four times as much: what is far too long is known to be
        after a part of it. A beginning may have more tokens than the whole, but not twice."""
        if fits is None:
            return
        size = _FIRST_CHARACTERS + 16 * fits
        whole = f"expected a text of at most {fits} tokens, got one of {len(text)} characters"
        if len(text) > _FIRST_CHARACTERS + _MOST_CHARACTERS_A_TOKEN * fits:
            raise SbdLengthError(
                f"{whole}: more than {_MOST_CHARACTERS_A_TOKEN} a token: shorten it"
            )
        while size < len(text):
            tokens = len(self.backend.encode(text[:size], add_special_tokens=False).ids)
            if tokens > 2 * fits:
                raise SbdLengthError(
                    f"{whole}, the first {size} of them {tokens} tokens: shorten it"
                )
            size *= 4

    def _leading_ids(self, metadata: Mapping[str, Any]) -> list[int]:
        add_bos = metadata.get("tokenizer.ggml.add_bos_token")
        if _HF_KEY in metadata and add_bos is not False:
            # The tokenizer's own post-processor decides, which may put more than BOS there.
            leading = self.backend.encode("", add_special_tokens=True).ids
            leading = [token for token in leading if token not in self.eos_token_ids]
            if leading or add_bos is None:
                return leading
        elif add_bos is None:
            add_bos = adds_bos(metadata)
        if add_bos and self.bos_token_id is not None:
            return [self.bos_token_id]
        return []


def _build(metadata: Mapping[str, Any]) -> GuardedTokenizer:
    source = metadata.get(_HF_KEY)
    if source is None:
        build = partial(tokenizer_from_ggml, metadata)
        return GuardedTokenizer(build, "tokenizer.ggml.*", SbdValueError)
    return GuardedTokenizer.from_json(source, _HF_KEY, SbdValueError)


def _decode_one(backend: GuardedTokenizer, id_: int, skip_special_tokens: bool) -> str:
    text: str = backend.decode([id_], skip_special_tokens=skip_special_tokens)
    return text
