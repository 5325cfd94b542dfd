"""A user's text from a file: its encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sbd_engine import SbdFileNotFoundError, SbdValueError
from sbd_engine.evaluation.questions import read_prompts, read_tasks
from sbd_engine.text_file import decode_utf8, read_text

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert decode_utf8(BOM + b"a\n", "x") == "a\n"
    assert decode_utf8(b"a" + BOM, "x") == "a\ufeff"  # behind the beginning it is a character
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(BOM + json.dumps({"prompt": "p", "answer": "a"}).encode() + b"\n")
    assert [question.prompt for question in read_tasks(file)] == ["p"]
    assert [question.prompt for question in read_prompts(file)] == ["p"]
    file = tmp_path / "prompts.txt"
    file.write_bytes(BOM + b"one\ntwo\n")
    assert [question.prompt for question in read_prompts(file)] == ["one", "two"]


def test_a_file_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbd_engine.text_file._MOST_BYTES", 1 << 16)
    with pytest.raises(SbdValueError, match="^/dev/zero: expected a text of at most 65536 bytes"):
        read_text(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"ab\xff", r"x: expected UTF-8 text, got byte 0xff at offset 2$"),
        ("ab".encode("utf-16-le"), None),
        ("\ufeffab".encode("utf-16-le"), "offset 0: it begins as UTF-16 does, save it as UTF-8$"),
        ("\ufeffab".encode("utf-16-be"), "offset 0: it begins as UTF-16 does, save it as UTF-8$"),
    ],
)
def test_other_encodings(data: bytes, complaint: str | None) -> None:
    if complaint is None:  # zero bytes are characters too
        assert decode_utf8(data, "x") == "a\0b\0"
        return
    with pytest.raises(SbdValueError, match=complaint):
        decode_utf8(data, "x")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SbdFileNotFoundError, match="nothing: no such file"):
        read_text(tmp_path / "nothing")
