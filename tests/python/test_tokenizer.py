"""Tokenizers of model files, and tokens to text piece by piece."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from python.tiny_model import BOS, CHAT_TEMPLATE, EOS, MASK, SYSTEM, byte_tokenizer
from tokenizers import processors

from sbd_engine.detokenizer import Detokenizer
from sbd_engine.errors import SbdError
from sbd_engine.ggml_tokenizer import tokenizer_from_ggml
from sbd_engine.stop_strings import StopStrings
from sbd_engine.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox, it's the 1st of 12345!",
    "def add(a, b):\n    return a + b\n\n\n",
    "  Größe, naïve café, Ελληνικά, 中文字符, 🙂🙃 and  two  spaces.\r\n\t",
    "x",
    " ",
]


def huggingface(add_bos: bool = True, **metadata: Any) -> Tokenizer:
    backend = byte_tokenizer(add_bos)
    keys = {
        "tokenizer.huggingface.json": backend.to_str(),
        "tokenizer.ggml.bos_token_id": backend.token_to_id(BOS),
    }
    return Tokenizer(keys | metadata, [backend.token_to_id(EOS)], backend.token_to_id(MASK))


def ggml_bpe(pre: str = "gpt-2") -> dict[str, Any]:
    """The keys of byte_tokenizer, with two rows that no token has."""
    backend = byte_tokenizer()
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocabulary] + ["[PAD0]", "[PAD1]"]
    special = {BOS, EOS, MASK}
    types = [3 if t in special else 4 if t == SYSTEM else 5 if "[PAD" in t else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [
            " ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": backend.token_to_id(BOS),
    }


class TestTokenizer:
    @pytest.mark.parametrize("text", TEXTS)
    def test_bpe_from_ggml_keys_is_the_one_from_json(self, text: str) -> None:
        expected = byte_tokenizer().encode(text, add_special_tokens=False).ids
        tokenizer = Tokenizer(ggml_bpe())
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text

    def test_special_tokens_in_text(self) -> None:
        tokenizer = Tokenizer(ggml_bpe())
        backend = byte_tokenizer()
        assert tokenizer.encode(f"{SYSTEM}a{EOS}") == [
            backend.token_to_id(token) for token in (SYSTEM, "a", EOS)
        ]
        ids = tokenizer.encode(f"{SYSTEM}a{EOS}")
        assert tokenizer.decode(ids) == f"{SYSTEM}a"  # user-defined ones are text
        assert tokenizer.decode(ids, skip_special_tokens=False) == f"{SYSTEM}a{EOS}"

    def test_pre_tokenizers_cut_as_their_models_do(self) -> None:
        def cuts(pre: str, text: str) -> list[str]:
            cutter = tokenizer_from_ggml(ggml_bpe(pre)).pre_tokenizer
            return [text[begin:end] for _, (begin, end) in cutter.pre_tokenize_str(text)]

        assert cuts("llama-bpe", "It's 12345\n\n x") == ["It", "'s", " ", "123", "45", "\n\n", " x"]
        assert cuts("qwen2", "It'S 123") == ["It", "'S", " ", "1", "2", "3"]
        assert cuts("gpt-2", "It's 12345  x") == ["It", "'s", " 12345", " ", " x"]
        assert cuts("smollm", "It's 123  x") == ["It", "'s", " ", "1", "2", "3", " ", " x"]
        camel = ["Hello", "World", " i", "Phone", " ", "1", "2", " -/\n", "x"]
        assert cuts("tekken", "HelloWorld iPhone 12 -/\nx") == camel
        # Four patterns, one after the other: punctuation, GPT-2's, numbers, three digits.
        default = ["Hello", ",", " world", "!!", " ", "123", "45", " don", "'", "t", " ", " x"]
        assert cuts("default", "Hello, world!! 12345 don't  x") == default
        text = "It's 12345\n\n naïve  中文 x"
        for pre, other in ("llama3", "llama-bpe"), ("falcon3", "llama-bpe"), ("megrez", "qwen2"):
            assert cuts(pre, text) == cuts(other, text)

    def test_whole_words_of_llama_3(self) -> None:
        keys = ggml_bpe("llama3")
        keys["tokenizer.ggml.tokens"][-1] = "Ġwhole"
        keys["tokenizer.ggml.add_bos_token"] = False
        ids = Tokenizer(keys).encode(" whole")
        assert ids == [len(keys["tokenizer.ggml.tokens"]) - 1]
        assert len(Tokenizer(keys | {"tokenizer.ggml.pre": "dbrx"}).encode(" whole")) > 1

    @pytest.mark.parametrize(
        ("pre", "bos"),
        [
            *(("llama-bpe", True), ("llama-v3", True), ("tekken", True)),
            *(("gpt-2", False), ("qwen2", False), ("default", False), ("dbrx", False)),
        ],
    )
    def test_bos_where_a_file_does_not_say(self, pre: str, bos: bool) -> None:
        keys = ggml_bpe(pre)
        first = [keys["tokenizer.ggml.bos_token_id"]]
        body = Tokenizer(keys).encode("the", add_bos=False)
        assert Tokenizer(keys).encode("the") == (first if bos else []) + body
        for says in False, True:
            told = Tokenizer(keys | {"tokenizer.ggml.add_bos_token": says})
            assert told.encode("the") == (first if says else []) + body

    def test_bos_comes_first_as_the_tokenizer_says(self) -> None:
        bos = byte_tokenizer().token_to_id(BOS)
        body = byte_tokenizer().encode("the", add_special_tokens=False).ids
        assert huggingface(add_bos=True).encode("the") == [bos, *body]
        assert huggingface(add_bos=False).encode("the") == body
        assert huggingface(add_bos=True).encode("the", add_bos=False) == body
        assert huggingface(add_bos=True).encode(f"{BOS}the") == [bos, *body]
        # The key has the last word.
        key = "tokenizer.ggml.add_bos_token"
        assert huggingface(add_bos=True, **{key: False}).encode("the") == body
        assert huggingface(add_bos=False, **{key: True}).encode("the") == [bos, *body]

    def test_all_that_the_tokenizer_puts_in_front(self) -> None:
        backend = byte_tokenizer()
        names = [(t, backend.token_to_id(t)) for t in (SYSTEM, BOS, EOS)]
        template = processors.TemplateProcessing(f"{SYSTEM} {BOS} $A {EOS}", None, names)
        backend.post_processor = template
        keys = {"tokenizer.huggingface.json": backend.to_str()}
        ends = [backend.token_to_id(EOS)]
        expected = [backend.token_to_id(token) for token in (SYSTEM, BOS, "a")]
        for says in {}, {"tokenizer.ggml.add_bos_token": True}:
            assert Tokenizer(keys | says, ends).encode("a") == expected

    def test_limits_from_training_do_not_cut_prompts(self) -> None:
        backend = byte_tokenizer()
        backend.enable_truncation(4)
        backend.enable_padding(length=32)
        tokenizer = Tokenizer({"tokenizer.huggingface.json": backend.to_str()})
        assert tokenizer.decode(tokenizer.encode("0123456789")) == "0123456789"

    def test_chat_template(self) -> None:
        tokenizer = huggingface(**{"tokenizer.chat_template": CHAT_TEMPLATE})
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        assert text == f"{BOS}{SYSTEM}user\nhi{SYSTEM}assistant\n"
        assert tokenizer.encode(text, add_bos=False).count(tokenizer.bos_token_id or -1) == 1

    @pytest.mark.parametrize(
        ("template", "complaint"),
        [
            ("{{ raise_exception('no system role') }}", "no system role"),
            ("{{ messages[0].__class__.__mro__ }}", "failed"),
            ("{% for", "failed"),
            ("{{ 1 // 0 }}", "failed"),
        ],
    )
    def test_bad_chat_template(self, template: str, complaint: str) -> None:
        tokenizer = huggingface(**{"tokenizer.chat_template": template})
        with pytest.raises(SbdError, match=complaint):
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"tokenizer.ggml.model": None}, "no tokenizer"),
            ({"tokenizer.ggml.model": "bert"}, "expected gpt2 or llama, got 'bert'"),
            ({"tokenizer.ggml.pre": "odd"}, "tokenizer.ggml.pre"),
            ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens"),
            ({"tokenizer.ggml.token_type": [1]}, "expected 270 types"),
            ({"tokenizer.ggml.merges": ["ab"]}, "expected two tokens, got 'ab'"),
            ({"tokenizer.ggml.merges": ["no where"]}, "tokenizer.ggml.merges"),
            ({"tokenizer.huggingface.json": "{}"}, "tokenizer.huggingface.json"),
            ({"tokenizer.ggml.model": "llama"}, "expected 270 scores"),
        ],
    )
    def test_bad_metadata(self, change: dict[str, Any], complaint: str) -> None:
        with pytest.raises(SbdError, match=complaint):
            Tokenizer(ggml_bpe() | change)


@pytest.fixture(scope="module")
def processor() -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def fed(detokenizer: Detokenizer, ids: Sequence[int], several: random.Random | None = None) -> str:
    """A token at a time, or several."""
    pieces, begin = [], 0
    while begin < len(ids):
        end = begin + (several.randint(1, 8) if several else 1)
        pieces.append(detokenizer.feed(*ids[begin:end]))
        begin = end
    return "".join(pieces) + detokenizer.flush()


@pytest.fixture(scope="module")
def tokenizer(processor: Any) -> Tokenizer:
    ids = range(processor.get_piece_size())
    kinds = [
        (processor.is_unknown, 2),
        (processor.is_control, 3),
        (processor.is_byte, 6),
    ]
    return Tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [
                next((kind for holds, kind in kinds if holds(i)), 1) for i in ids
            ],
        },
        [processor.eos_id()],
    )


class TestSentencePiece:
    """Against the sentencepiece library, on a model it trains here."""

    @pytest.mark.parametrize("text", [*TEXTS, "unseen Ж and 漢, then  12\n"])
    def test_same_ids_and_text(self, processor: Any, tokenizer: Tokenizer, text: str) -> None:
        ids = processor.encode(text)
        assert tokenizer.encode(text) == [processor.bos_id(), *ids]
        assert tokenizer.decode(ids) == processor.decode(ids) == text

    def test_space_before_a_word_is_kept(self, processor: Any, tokenizer: Tokenizer) -> None:
        prompt, new = processor.encode("the quick"), processor.encode("fox, it's 🙂 the")
        rng = random.Random(2)
        for several in None, rng, rng, rng, rng:
            text = fed(Detokenizer(tokenizer, prompt), new, several)
            assert "the quick" + text == "the quick fox, it's 🙂 the"


class TestDetokenizer:
    def test_who_needs_no_context(self, tokenizer: Tokenizer) -> None:
        assert huggingface().joins_bytes
        assert not tokenizer.joins_bytes  # SentencePiece's, which take off a space

    @pytest.mark.parametrize("text", TEXTS)
    def test_whole_characters_only(self, text: str) -> None:
        tokenizer = huggingface()
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.feed(token) for token in tokenizer.encode(text)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) == text
        assert detokenizer.flush() == ""

    def test_any_tokens_give_the_text_of_the_whole(self) -> None:
        tokenizer = huggingface()
        rng = random.Random(1)
        for _ in range(200):
            ids = [rng.randrange(260) for _ in range(rng.randrange(1, 40))]
            assert fed(Detokenizer(tokenizer), ids) == tokenizer.decode(ids)
            assert fed(Detokenizer(tokenizer), ids, rng) == tokenizer.decode(ids)

    def test_a_character_that_the_prompt_began(self) -> None:
        tokenizer = huggingface()
        ids = tokenizer.encode("a中", add_bos=False)
        detokenizer = Detokenizer(tokenizer, ids[:2])
        assert "".join(detokenizer.feed(token) for token in ids[2:]) == "中"

    def test_incomplete_end_is_shown_when_no_more_follows(self) -> None:
        tokenizer = huggingface()
        detokenizer = Detokenizer(tokenizer)
        held = [detokenizer.feed(token) for token in tokenizer.encode("a中")[:-1]]
        assert "".join(held) == "a"
        assert detokenizer.flush() == "\ufffd"


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Feeding one character at a time, stated anew: the shortest prefix that ends in a stop."""
    for end in range(1, len(text) + 1):
        begins = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if begins:
            return text[: min(begins)], True
    return text, False


class TestStopStrings:
    def test_random_texts_and_stops(self) -> None:
        rng = random.Random(2)
        for _ in range(2000):
            text = "".join(rng.choice("ab\n") for _ in range(rng.randrange(20)))
            stops = [
                "".join(rng.choice("ab\n") for _ in range(rng.randrange(1, 5)))
                for _ in range(rng.randrange(4))
            ]
            watcher = StopStrings(stops)
            given = ""
            for character in text:
                given += watcher.feed(character)
                if watcher.stopped:
                    break
                assert text.startswith(given)
            if not watcher.stopped:
                given += watcher.flush()
            assert (given, watcher.stopped) == cut(text, stops)

    def test_a_possible_beginning_is_held_back(self) -> None:
        watcher = StopStrings(["\n\n", "END"])
        assert [watcher.feed(piece) for piece in ("a\n", "b E", "N", "d\n", "\nc")] == [
            "a",
            "\nb ",
            "",
            "ENd",
            "",
        ]
        assert watcher.stopped

    def test_stop_inside_one_piece(self) -> None:
        watcher = StopStrings(["x"])
        assert watcher.feed("abxcd") == "ab"
        assert watcher.stopped
