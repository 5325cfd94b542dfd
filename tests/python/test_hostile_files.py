"""A model file comes from anyone: what loading it will take is known before it is taken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sbd_engine import Engine, SbdError, SbdMemoryError

from .command import call_here, check_refused
from .hostile import llama_keys, llama_shapes, python, write_sparse

WIDE = 1 << 18


@pytest.mark.parametrize(
    ("keys", "shapes"),
    [
        (dict(vocab_size=1 << 22, embedding_length=WIDE), dict(vocab=1 << 22, hidden=WIDE)),
        (
            dict(block_count=300, embedding_length=1 << 14, feed_forward_length=1 << 17),
            dict(hidden=1 << 14, ffn=1 << 17, layers=300),
        ),
    ],
)
def test_more_than_there_is_memory(
    keys: dict[str, int], shapes: dict[str, int], tmp_path: Path
) -> None:
    path = write_sparse(tmp_path / "model.bin", llama_keys(**keys), llama_shapes(**shapes))
    assert path.stat().st_size > 1 << 42
    with pytest.raises(SbdMemoryError, match=r"the model needs \d+ MiB, \d+ for its weights, and"):
        Engine(path)


def test_random_weights_of_any_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dict(model_type="llama", vocab_size=1 << 22, hidden_size=WIDE, rms_norm_eps=1e-5)
    config |= dict(intermediate_size=1 << 20, num_hidden_layers=4096, num_attention_heads=1024)
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    done = call_here(capsys, "bench", "--config", tmp_path / "config.json")
    check_refused(done, "random weights: the model needs")


def test_a_prompt_for_a_very_wide_model(tmp_path: Path) -> None:
    """A row of it is 16 MiB: a forward has fewer rows."""
    ffn = 1 << 20
    keys, shapes = llama_keys(feed_forward_length=ffn), llama_shapes(ffn=ffn)
    path = write_sparse(tmp_path / "model.bin", keys, shapes)
    done = python(
        "from sbd_engine import Engine\n"
        f"print(Engine({str(path)!r}, n_threads=1).generate([1] * 80, max_tokens=1).tokens)"
    )
    assert (done.code, done.output) == (0, "[0]\n")
    assert done.mib < 1000
    with Engine(path, n_threads=1) as engine, pytest.raises(SbdMemoryError, match="block_size"):
        engine._core.time_forwards([600], 0, 1)


def test_wide_heads(tmp_path: Path) -> None:
    sizes = dict(embedding_length=2, vocab_size=8) | {"attention.key_length": WIDE}
    shapes = dict(llama_shapes())
    for name in "q", "k", "v":
        shapes[f"blk.0.attn_{name}.weight"] = (WIDE, 2)
    shapes["blk.0.attn_output.weight"] = (2, WIDE)
    path = write_sparse(tmp_path / "model.bin", llama_keys(**sizes), shapes)
    done = python(
        "from sbd_engine import Engine\n"
        f"e = Engine({str(path)!r}, n_threads=4, n_ctx=64)\n"
        "print(e.generate([1] * 40, max_tokens=2).tokens)"
    )
    assert (done.code, done.output) == (0, "[0, 0]\n")
    assert done.mib < 600


def test_counts_of_what_no_model_has(tmp_path: Path) -> None:
    names = {f"{i:x}": (1,) for i in range((1 << 17) + 1)}
    path = write_sparse(tmp_path / "model.bin", llama_keys(), names)
    with pytest.raises(SbdError, match="131073 tensors, expected at most 131072"):
        Engine(path)
    for layers in 4097, 2**31:
        path = write_sparse(tmp_path / "model.bin", llama_keys(block_count=layers), llama_shapes())
        with pytest.raises(SbdError, match="block_count' is"):
            Engine(path)


def test_a_key_of_gigabytes(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "model.bin", llama_keys() | {"x": "y"}, llama_shapes())
    data = path.read_bytes()
    at = data.index(b"\1\0\0\0\0\0\0\0y")
    path.write_bytes(data[:at] + (1 << 32).to_bytes(8, "little"))
    os.truncate(path, 1 << 33)
    with pytest.raises(SbdError, match="keys and descriptions of more than 536870912 bytes"):
        Engine(path)


def test_a_file_cut_short_behind_loading(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.bin"
    copy.write_bytes(model.read_bytes())
    with Engine(model) as engine, Engine(copy) as cut:
        os.truncate(copy, 100)
        assert cut.generate("a", max_tokens=9).tokens == engine.generate("a", max_tokens=9).tokens
        assert cut.config == engine.config


def test_a_file_cut_short_while_it_loads(tmp_path: Path) -> None:
    """Of a gigabyte, by a thread of the same process: whenever it comes, an error or no harm."""
    vocab, hidden = 1 << 19, 512
    keys = llama_keys(vocab_size=vocab, embedding_length=hidden)
    path = tmp_path / "model.bin"
    for delay in 0.0, 0.02, 0.1:
        write_sparse(path, keys, llama_shapes(vocab=vocab, hidden=hidden))
        done = python(
            "import os, threading\n"
            "from sbd_engine import Engine, SbdError\n"
            f"threading.Timer({delay}, os.truncate, ({str(path)!r}, 1 << 20)).start()\n"
            f"try: Engine({str(path)!r})\n"
            "except SbdError as error: print(error)\n"
        )
        assert done.code == 0
        assert "cut short" in done.output or "data section" in done.output or not done.output
