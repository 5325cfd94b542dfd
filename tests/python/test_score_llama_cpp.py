"""Log-probabilities and perplexity beside llama.cpp's of the same files, of a real model.

In F32 the two agree as far as float32 does. In Q8_0 both round activations to 8 bits, each its own
way: so they differ by as much as either does from the same weights with exact activations. Needs
llama-cpp-python, which is no dependency; skipped without it.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import numpy as np
import pytest
from python.command import run_here
from reference.stats import log_softmax

from sbd_engine import Engine

from .checkpoints import Array, convert_quietly
from .real_model import write_checkpoint_of

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("real model")  # one of it in memory

TEXT = topics["execmodel"][:5000]
WINDOW = 256


class Files(NamedTuple):
    q8_0: Path
    exact: Path  # its values in F32


@pytest.fixture(scope="module")
def files(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("score")
    made = Files(folder / "q8_0.bin", folder / "exact.bin")
    write_checkpoint_of(real_model, folder / "checkpoint")
    convert_quietly(folder / "checkpoint", made.q8_0, type="q8_0")
    write_checkpoint_of(made.q8_0, folder / "exact")
    convert_quietly(folder / "exact", made.exact, type="f32")
    return made


def of_llama_cpp(path: Path) -> tuple[Array, list[list[int]]]:
    """-log p of each token in the second half of each window, as `llama-perplexity` counts them,
    and the windows."""
    f32 = llama_cpp.GGML_TYPE_F32
    llama = llama_cpp.Llama(
        str(path), n_ctx=WINDOW, logits_all=True, type_k=f32, type_v=f32, verbose=False
    )
    ids = llama.tokenize(TEXT.encode(), add_bos=False)
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    losses = []
    for window in windows:
        llama.reset()
        llama.eval(window)
        rows = log_softmax(llama.scores[:WINDOW])
        losses += [-rows[i, window[i + 1]] for i in range(WINDOW // 2, WINDOW - 1)]
    return np.array(losses), windows


def of_ours(path: Path, windows: list[list[int]]) -> Array:
    with Engine(path, kv_dtype="f32") as engine:
        assert engine.tokenizer.encode(TEXT)[: WINDOW * len(windows)] == [*chain(*windows)]
        scores = [engine.score(window).logprobs[WINDOW // 2 + 1 :] for window in windows]
    return -np.array(scores, float).ravel()


def distance(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)))


def test_log_probabilities_and_perplexity(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, windows = of_llama_cpp(files.exact)
    exact = of_ours(files.exact, windows)
    assert np.max(np.abs(exact - theirs)) < 1e-4

    theirs, _ = of_llama_cpp(files.q8_0)
    ours = of_ours(files.q8_0, windows)
    rounding = distance(ours, exact)  # of activations alone: the weights are the same
    assert 0.02 < rounding < 0.2
    assert 0.5 < distance(theirs, exact) / rounding < 2
    assert distance(ours, theirs) < 1.5 * rounding
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.01

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ("perplexity", files.q8_0, text, "-c", WINDOW, "--kv-dtype", "f32", "--json")
    report = json.loads(run_here(capsys, *command).stdout)
    assert (report["tokens"], report["windows"]) == (len(ours), len(windows))
    assert report["perplexity"] == pytest.approx(np.exp(np.mean(ours)), rel=1e-5)
    assert report["perplexity"] == pytest.approx(np.exp(np.mean(theirs)), rel=0.01)
