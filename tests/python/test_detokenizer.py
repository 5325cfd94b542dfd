"""Bytes to text where characters are cut, and stop strings that hold special tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from python.made_event import Event
from python.tiny_model import BOS, EOS, SYSTEM, byte_tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from sbd_engine.detokenizer import Detokenizer
from sbd_engine.errors import SbdError
from sbd_engine.parameters import parse
from sbd_engine.session import Session
from sbd_engine.stop_strings import StopStrings
from sbd_engine.tokenizer import Tokenizer

A, SPACE_B, NOTHING = 256, 257, 300  # ids behind the bytes; the last is none


class ByteFallback:
    """Tokens 0 to 255 are bytes, as in Llama 2; the longest input it was given is kept."""

    def __init__(self) -> None:
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
        model = models.BPE(vocabulary | {"a": A, "▁b": SPACE_B}, [], byte_fallback=True)
        self._backend = Backend(model)
        self._backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        self.longest = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return self._backend.decode(list(ids))


class Chunks:
    """Tokens of any bytes, decoded as byte-level BPE is: in one piece."""

    def __init__(self, chunks: Sequence[bytes], joins_bytes: bool) -> None:
        self._chunks = chunks
        self.joins_bytes = joins_bytes
        self.longest = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return b"".join(self._chunks[i] for i in ids).decode(errors="replace")


def streamed(tokenizer: Any, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join([*map(detokenizer.feed, ids), detokenizer.flush()])


def one_mark(text: str) -> str:
    """Decoders differ in how many marks they put for bytes that are no character."""
    return re.sub("\ufffd+", "\ufffd", text)


class TestBytes:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            ("😀😀".encode(), "😀😀"),
            ("😀😀".encode()[:5], "😀\ufffd"),
            ("𠮷é".encode() + b"\xc3", "𠮷é\ufffd"),
            (b"\xc3\xa9\xff", "é\ufffd"),
            (b"\xc3\xa9\xff" + "é中".encode(), "é\ufffdé中"),
            (b"\xc3A", "\ufffdA"),
            (b"\xff\xff" + "中中".encode(), "\ufffd\ufffd中中"),
            (b"\xff" * 20 + "é".encode(), "\ufffd" * 20 + "é"),
        ],
    )
    def test_only_what_is_cut_is_marked(self, data: bytes, text: str) -> None:
        assert streamed(ByteFallback(), list(data), [A]) == text
        assert streamed(ByteFallback(), [*data, SPACE_B], [A]) == f"{text} b"
        for joins in True, False:
            chunks = Chunks([bytes([byte]) for byte in range(256)], joins)
            assert streamed(chunks, list(data), [65]) == data.decode(errors="replace")

    @pytest.mark.parametrize("prompt", ["😀😀", "a😀😀", "éé中中", "中" * 9])
    def test_a_prompt_that_ends_in_bytes(self, prompt: str) -> None:
        ids = list(prompt.encode())
        assert streamed(ByteFallback(), [SPACE_B], ids) == " b"
        assert streamed(ByteFallback(), list("中".encode()), ids) == "中"
        assert streamed(ByteFallback(), ids[-2:], ids[:-2]) == prompt[-1]
        assert (
            streamed(ByteFallback(), [SPACE_B], ids[:-1])
            == "\ufffd" * (len(prompt[-1].encode()) - 1) + " b"
        )

    def test_random_bytes_and_words(self) -> None:
        rng = random.Random(3)
        pieces = [*(list(c.encode()) for c in "é中😀ж"), [0xFF], [0xC3], [0xF0, 0x9F], [65]]
        for _ in range(300):
            expected, ids = b"", []
            for _ in range(rng.randrange(12)):
                word = rng.random() < 0.3
                piece = [A] if word else rng.choice(pieces)
                ids += piece
                expected += b"a" if word else bytes(piece)
            text = streamed(ByteFallback(), ids, [A])
            assert one_mark(text) == one_mark(expected.decode(errors="replace"))

    @pytest.mark.parametrize("joins", [True, False])
    def test_tokens_that_end_within_a_character(self, joins: bool) -> None:
        rng = random.Random(4)
        text = "".join(rng.choice("aé中😀\n") for _ in range(2000)).encode()
        cuts = sorted({0, len(text), *rng.choices(range(len(text)), k=900)})
        chunks = Chunks([text[a:b] for a, b in pairwise(cuts)], joins)
        ids = range(len(cuts) - 1)
        assert streamed(chunks, ids) == text.decode()
        assert chunks.longest < (12 if joins else 20)

    @pytest.mark.parametrize("joins", [True, False])
    @pytest.mark.parametrize(
        "chunk", [b"", b"\xff", b"\xf0", b"\xad\xe4\xb8", b"\xff\xff\xff", "�".encode()]
    )
    def test_the_window_stays_short(self, chunk: bytes, joins: bool) -> None:
        """Whatever never becomes a character: each token costs the same."""
        chunks = Chunks([b"\xe4\xb8", chunk, b"\xad."], joins)
        ids = [0, *[1] * 1000, 2]
        whole = b"".join([b"\xe4\xb8", chunk * 1000, b"\xad."]).decode(errors="replace")
        assert streamed(chunks, ids) == whole or not chunk  # for so long no character waits
        assert chunks.longest < 20

    def test_the_window_stays_short_in_a_run_of_bytes(self) -> None:
        for run in ([0xFF] * 1000, [0xF0, 0x9F] * 500, list("中".encode()) * 300, [NOTHING] * 1000):
            tokenizer = ByteFallback()
            text = streamed(tokenizer, [*run, A], [A])
            assert text.endswith("a")
            assert tokenizer.longest < 20


def ended(
    text: str, stop: Sequence[str], by: int = 1, skip_special_tokens: bool = True
) -> tuple[str, int, str | None]:
    """What a generation of `text` gives, `by` tokens a forward: text, tokens and reason."""
    backend = byte_tokenizer()
    tokenizer = Tokenizer({"tokenizer.huggingface.json": backend.to_str()})
    session = Session([0], stop, tokenizer, called=0.0, skip_special_tokens=skip_special_tokens)
    ids = tokenizer.encode(text, add_bos=False)
    for at in range(0, len(ids), by):
        last = at + by >= len(ids)
        chunk = session.absorb(Event(ids[at : at + by], finished="length" if last else None))
        if chunk.finish_reason:
            break
    done = session.completion()
    return done.text, len(done.tokens), done.finish_reason


class TestStopsWithSpecialTokens:
    @pytest.mark.parametrize("by", [1, 3, 100])
    @pytest.mark.parametrize(
        ("stop", "text", "tokens"),
        [
            ([SYSTEM], "ab", 3),
            ([f"b{SYSTEM}"], "a", 3),
            ([f"{SYSTEM}c"], "ab", 4),
            ([f"{SYSTEM}c{EOS}"], "ab", 5),
            ([EOS], "abc", 5),
            ([f"{EOS}de", "d"], "abc", 6),
            (["<|system"], "abcde", 7),  # a token is whole or not at all
            (["s", "|>c"], "abcde", 7),
            ([BOS, "x"], "abcde", 7),
        ],
    )
    def test_matched_and_hidden(self, stop: list[str], text: str, tokens: int, by: int) -> None:
        reason = "length" if tokens == 7 else "stop"
        assert ended(f"ab{SYSTEM}c{EOS}de", stop, by) == (text, tokens, reason)

    @pytest.mark.parametrize("by", [1, 3, 100])
    def test_shown(self, by: int) -> None:
        shown = f"ab{SYSTEM}c"
        assert ended(f"{shown}{EOS}de", ["nothing"], by, False)[0] == f"{shown}{EOS}de"
        assert ended(f"{shown}{EOS}de", [EOS], by, False) == (shown, 5, "stop")
        assert ended(f"{shown}{EOS}de", [f"{SYSTEM}c"], by, False) == ("ab", 4, "stop")

    def test_written_out_it_is_text(self) -> None:
        watcher = StopStrings([list("<s>"), ["<s>", "x"]])
        assert watcher.feed("a<s") == "a"
        assert watcher.feed(">b") == ""
        assert watcher.stopped

    def test_space_behind_a_special_token(self) -> None:
        for spaced, stop in (
            (True, ["<s>", "d"]),
            (True, ["<s>", " ", "d"]),
            (False, ["<s>", " ", "d"]),
        ):
            watcher = StopStrings([stop], spaced)
            assert (watcher.feed("c"), watcher.feed_whole("<s>", shown="")) == ("c", "")
            assert (watcher.feed(" d"), watcher.stopped) == ("", True)
        watcher = StopStrings([["<s>", "d"]])
        assert (watcher.feed("c"), watcher.feed_whole("<s>", shown="")) == ("c", "")
        assert (watcher.feed(" d"), watcher.stopped) == (" d", False)

    def test_a_space_that_was_taken_is_let_out(self) -> None:
        watcher = StopStrings([["<s>", "d", "x"], ["d", "y"]], spaced=True)
        assert watcher.feed_whole("<s>", shown="") == ""
        assert watcher.feed(" d") == ""
        assert watcher.feed("y") == " "
        assert watcher.stopped


class TestManyStops:
    def test_as_many_as_may_be(self) -> None:
        stops = [f"{i:016d}" for i in range(1, 1025)]
        watcher = StopStrings(parse({"prompt": "x", "stop": stops}).stop)
        assert watcher.feed("0" * 5000 + "9") == "0" * (5000 - 15)
        assert watcher.stopped

    @pytest.mark.parametrize(
        "stops", [map(str, range(10**6)), ["x" * 20_000], (c for c in iter(lambda: "x", ""))]
    )
    def test_more_are_refused(self, stops: Any) -> None:
        with pytest.raises(SbdError, match="`stop` strings"):
            parse({"prompt": "x", "stop": stops})
