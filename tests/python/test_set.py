"""`sbd-engine set`, beside a conversion that was told the same and gguf's own reader."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from python.command import call_here, check_refused
from python.full_disk import full_disk
from python.tiny_model import write_tiny_model

from sbd_engine import Engine
from sbd_engine.cli import main
from sbd_engine.convert import convert
from sbd_engine.key_editor import _copy, edit_keys

SETTINGS = [
    "gamma=0.1",
    "unmask=confidence",
    "threshold=0.75",
    "block_size=8",
    "decoders=sbd_lossless,sbd,ntp",
    "eos_token_ids=262,263",
    "proxy=margin",
    "dmtd.layers=0,2,1",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("set"))


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "model.bin"
    copy.write_bytes(original.read_bytes())
    return copy


def set_keys(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    return call_here(capsys, "set", *arguments)


def keys(path: Path) -> dict[str, tuple[Any, Any]]:
    """Types and value of every key, as gguf reads them."""
    fields = GGUFReader(path).fields
    return {name: (field.types, field.contents()) for name, field in fields.items()}


def tensors(path: Path) -> list[tuple[str, Any, list[int], bytes]]:
    found = GGUFReader(path).tensors
    return [(t.name, t.tensor_type, [*t.shape], t.data.tobytes()) for t in found]


def test_an_older_name_of_a_key(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that have it load; `set` takes both names and writes today's."""
    as_before = model.read_bytes()
    edit_keys(model, {"sbd.threshold": 0.75}, [])
    with Engine(model) as engine:
        assert engine.defaults["confidence_threshold"] == 0.75
    shown = "sbd.confidence_threshold: 0.75 -> none\n"
    assert set_keys(capsys, model, "--unset", "threshold") == (0, shown, "")
    assert model.read_bytes() == as_before
    edit_keys(model, {"sbd.threshold": 0.75}, [])
    shown = "sbd.confidence_threshold: 0.75 -> 0.5\n"
    assert set_keys(capsys, model, "threshold=0.5") == (0, shown, "")
    assert keys(model)["sbd.confidence_threshold"][1] == 0.5
    assert "sbd.threshold" not in keys(model)


def test_as_if_converted_so(
    original: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = tmp_path / "converted.bin"
    convert(original.parent / "checkpoint", converted, type="f32", settings=SETTINGS)
    code, out, err = set_keys(capsys, model, *SETTINGS)
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == [
        "sbd.gamma: none -> 0.1",
        "sbd.unmask: none -> confidence",
        "sbd.confidence_threshold: none -> 0.75",
    ]
    mine, expected = keys(model), keys(converted)
    for name in ("sbd.dmtd.horizon", "sbd.dmtd.prompt_rule"):  # the engine's own defaults
        del expected[name]
    for name in ("GGUF.kv_count", "GGUF.tensor_count"):
        mine.pop(name), expected.pop(name)
    assert mine == expected
    assert tensors(model) == tensors(original)
    assert {*tmp_path.iterdir()} == {model, converted}
    # And it decodes as the other does.
    with Engine(model) as one, Engine(converted) as two:
        assert one.auto_decoder == two.auto_decoder == "sbd_lossless"
        assert one.defaults == two.defaults
        texts = [engine.generate("abc", max_tokens=20, block_size=8) for engine in (one, two)]
        assert texts[0].tokens == texts[1].tokens and texts[0].stats.nfe == texts[1].stats.nfe


def test_and_back_again(original: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set_keys(capsys, model, "sbd.gamma=0.25", "steps=3")[0] == 0
    assert model.stat().st_size > original.stat().st_size
    code, out, _ = set_keys(capsys, model, "--unset", "sbd.gamma", "--unset", "steps")
    assert (code, out) == (0, "sbd.gamma: 0.25 -> none\nsbd.steps: 3 -> none\n")
    assert model.read_bytes() == original.read_bytes()


def test_what_is_so_already_is_not_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.stat()
    code, out, _ = set_keys(capsys, model, "block_size=16")
    assert (code, out) == (0, "sbd.block_size: 16 -> 16 (as it was)\n")
    assert model.stat().st_ino == before.st_ino


def test_other_readers_find_the_mask_token(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = set_keys(capsys, model, "mask_token_id=270", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["before"]["sbd.mask_token_id"] != 270
    assert report["after"]["sbd.mask_token_id"] == 270
    assert report["after"].keys() == report["before"].keys()
    assert keys(model)["tokenizer.ggml.mask_token_id"][1] == 270
    settings = ["--unset", "mask_token_id", "--unset", "block_size", "decoders=ntp"]
    assert set_keys(capsys, model, *settings)[0] == 0
    assert "tokenizer.ggml.mask_token_id" not in keys(model)
    with Engine(model) as engine:
        assert engine.model_config["mask_token_id"] is None


def test_rights_stay_and_who_reads_it_keeps_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.chmod(0o640)
    with Engine(model) as engine:
        assert set_keys(capsys, model, "block_size=4")[0] == 0
        assert engine.defaults["block_size"] == 16
        assert engine.generate("abc", max_tokens=4).tokens
    assert stat.S_IMODE(model.stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "set: expected KEY=VALUE or --unset KEY, got neither"),
        (["gamma"], "set: expected KEY=VALUE, got 'gamma'"),
        (["gama=1"], "set: unknown key 'gama': expected one of sbd.mask_token_id, "),
        (["general.name=x"], "unknown key 'general.name'"),
        (["gamma=-1"], "gamma: expected a number from 0 to inf, got '-1'"),
        (["sbd.gamma=nan"], "sbd.gamma: expected a number"),
        (["factor=1e-50"], "factor: expected a number above 0, got '1e-50'"),
        (["factor=nan"], "factor: expected a number above 0, got 'nan'"),
        (["top_n=" + "9" * 5000], "top_n: expected an integer from 1 to 2147483647, got '999"),
        (["unmask=bold"], "unmask: expected one of entropy_bounded, factor, confidence, top_n"),
        (["decoders=sbd,sbd"], "decoders: expected some of ntp,sbd,"),
        (["decoders=dmtd"], 'decoder "dmtd" needs a cut of the layers'),
        (["block_size=513"], "model.bin: key 'sbd.block_size' is 513, expected 1 to 512"),
        (["sub_block_size=5"], "expected a divisor of block_size 16; nothing was changed"),
        (["mask_token_id=272"], "'sbd.mask_token_id' is 272, expected 0 to 271"),
        (["dmtd.layers=1,1,2"], "sbd.dmtd.layers"),
        (["--unset", "mask_token_id"], "mask token"),
        (["--unset", "gamma"], "model.bin: --unset sbd.gamma: the file has no such key"),
        (["--unset", "general.name"], "--unset sbd.general.name: the file has no such key"),
        (["gamma=1", "--unset", "sbd.gamma"], "sbd.gamma is given a value and to --unset"),
    ],
)
def test_bad_input(
    arguments: list[str], complaint: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, content = model.stat(), model.read_bytes()
    check_refused(set_keys(capsys, model, *arguments), complaint)
    assert (model.stat().st_ino, model.read_bytes()) == (before.st_ino, content)
    assert [*model.parent.iterdir()] == [model]


def test_bad_files(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut, link, pipe = tmp_path / "cut.bin", tmp_path / "link.bin", tmp_path / "pipe.bin"
    cut.write_bytes(original.read_bytes()[:-1])
    link.symlink_to(original)
    os.mkfifo(pipe)
    before = original.read_bytes()
    for path, complaint in (
        (tmp_path / "no.bin", "no such file"),
        (tmp_path, "got a folder, pipe or device"),
        (pipe, "got a folder, pipe or device"),
        (link, f"got a symbolic link to {original}"),
        (cut, "cut.bin"),
    ):
        check_refused(set_keys(capsys, path, "gamma=1"), complaint)
    assert original.read_bytes() == before
    assert cut.read_bytes() == before[:-1]


def test_a_disk_that_is_full(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    with full_disk(len(before) // 2):
        check_refused(
            set_keys(capsys, model, "gamma=1"), "model.bin: cannot be written: File too large"
        )
    assert model.read_bytes() == before
    assert [*model.parent.iterdir()] == [model]


def test_a_file_of_others(original: Path, tmp_path: Path) -> None:
    """32-byte alignment and no keys of ours, as a GGUF from elsewhere."""
    from gguf import GGUFWriter

    foreign = tmp_path / "foreign.gguf"
    source = GGUFReader(original)
    writer = GGUFWriter(foreign, "qwen3")
    for name, field in source.fields.items():
        if not name.startswith(("GGUF.", "sbd.", "general.a", "tokenizer.ggml.mask")):
            kind = field.types[0]
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), kind, sub)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Engine(foreign) as engine:
        assert engine.auto_decoder == "ntp"
    before = keys(foreign), tensors(foreign)
    assert main.run(["set", str(foreign), "mask_token_id=258", "block_size=8", "decoders=sbd"]) == 0
    with Engine(foreign) as engine:
        assert engine.auto_decoder == "sbd"
    assert tensors(foreign) == before[1] == tensors(original)
    after = keys(foreign)
    assert {name: after[name] for name in before[0] if name != "GGUF.kv_count"} == {
        name: value for name, value in before[0].items() if name != "GGUF.kv_count"
    }


@pytest.mark.parametrize("folder", [None, "/dev/shm"])
def test_copying(folder: str | None, tmp_path: Path) -> None:
    """Within a file system, and where the kernel may refuse to copy between two."""
    if folder and not Path(folder).is_dir():
        pytest.skip(f"no {folder}")
    data = np.random.default_rng(0).bytes(300_000)
    target = tmp_path / "target"
    source = Path(folder or tmp_path) / f"source{os.getpid()}"
    try:
        source.write_bytes(data)
        with source.open("rb") as read, target.open("wb") as written:
            os.lseek(written.fileno(), 7, os.SEEK_SET)
            _copy(read.fileno(), written.fileno(), 1000, 290_000)
    finally:
        source.unlink()
    assert target.read_bytes() == bytes(7) + data[1000:290_000]
