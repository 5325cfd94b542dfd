"""Engine.score and `sbd-engine perplexity`: against transformers' log-probabilities, and numpy's on
the raw logits of `forward`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from python.command import PROMPT, check_error, on_a_terminal, run_here
from python.tiny_model import BOS, VOCAB_SIZE, byte_tokenizer, write_tiny_model
from reference.random_model import random_model, write_checkpoint
from reference.stats import log_softmax

from sbd_engine import Engine, SbdError
from sbd_engine.convert import convert

BOS_ID = byte_tokenizer().token_to_id(BOS)
TEXT = "the quick brown fox jumps over the lazy dog and the dog does not mind; " * 4


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_log_probabilities_are_transformers(architecture: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = random_model(3, architecture, rope="default", tied=False)
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    convert([checkpoint], tmp_path / "model.bin", type="f32", warn=lambda _: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = model.prompt(120)
    with torch.no_grad():
        rows = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).numpy()
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        scores = engine.score(ids, top=5)
        assert engine.score(np.array(ids)).logprobs == scores.logprobs
    assert scores.tokens == ids
    assert (scores.logprobs[0], scores.ranks[0], scores.top[0]) == (None, None, [])
    given = rows[np.arange(len(rows)), ids[1:]]
    assert np.array(scores.logprobs[1:], float) == pytest.approx(given, abs=1e-4)
    for row, token, rank, best in zip(rows, ids[1:], scores.ranks[1:], scores.top[1:], strict=True):
        order = np.argsort(-row, kind="stable")
        assert order[rank] == token
        assert [each for each, _ in best] == order[:5].tolist()
        assert [logprob for _, logprob in best] == pytest.approx(row[order[:5]], abs=1e-4)


def test_long_texts_and_the_mask_token(model: Path) -> None:
    """In parts of rows that are no one's, as `forward`; a mask token counts like any other."""
    with Engine(model, kv_dtype="f32") as engine:
        mask = engine.model_config["mask_token_id"]
        ids = [(7 * i + i // 9) % 256 for i in range(511)] + [mask]
        rows = log_softmax(engine.forward(ids[:-1]))
        given = rows[np.arange(len(rows)), ids[1:]]
        assert np.array(engine.score(ids).logprobs[1:], float) == pytest.approx(given, abs=1e-5)
    with Engine(write_long(model), kv_dtype="f32") as long:
        ids = [(7 * i + i // 9) % 256 for i in range(1300)]
        rows = log_softmax(long.forward(ids[:-1]))
        given = rows[np.arange(len(rows)), ids[1:]]
        assert np.array(long.score(ids).logprobs[1:], float) == pytest.approx(given, abs=1e-5)


def write_long(model: Path) -> Path:
    folder = model.parent / "long"
    folder.mkdir(exist_ok=True)
    return write_tiny_model(folder, n_ctx=2048)


def test_text_begins_as_a_prompt_does(engine: Engine) -> None:
    scores = engine.score(PROMPT)
    assert scores.tokens == engine.tokenizer.encode(PROMPT)
    assert scores.tokens[0] == BOS_ID
    assert scores.top == [[]] * len(scores.tokens)


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ((PROMPT, -1), ValueError, "`top` >= 0, got -1"),
        ((PROMPT, 21), ValueError, "`top` <= 20, got 21"),
        ((PROMPT, 1.0), TypeError, "integer `top`, got 1.0"),
        (([5],), ValueError, "at least two token ids"),
        (("",), ValueError, "empty"),
        (([1, VOCAB_SIZE],), ValueError, f"got {VOCAB_SIZE} at position 1"),
        (([1] * 513,), ValueError, "within the context of 512, got 513: shorten it$"),
        ((b"bytes",), TypeError, "got bytes"),
    ],
)
def test_bad_input(engine: Engine, arguments: tuple[Any, ...], kind: type, complaint: str) -> None:
    with pytest.raises(kind, match=complaint) as caught:
        engine.score(*arguments)
    assert isinstance(caught.value, SbdError)
    assert "\n" not in str(caught.value)


def test_a_small_vocabulary_bounds_the_best(tmp_path: Path) -> None:
    import dataclasses

    whole = random_model(1, "llama", rope="default", tied=True)
    few = whole.tensors["model.embed_tokens.weight"][:12]
    config = {**whole.config, "vocab_size": 12, "mask_token_id": 11}
    config |= {"bos_token_id": 1, "eos_token_id": [2]}
    small = dataclasses.replace(
        whole, config=config, tensors={**whole.tensors, "model.embed_tokens.weight": few}
    )
    checkpoint = write_checkpoint(small, tmp_path / "checkpoint")
    convert([checkpoint], tmp_path / "model.bin", type="f32", warn=lambda _: None)
    with Engine(tmp_path / "model.bin") as engine:
        assert len(engine.score([3, 4], top=12).top[1]) == 12
        with pytest.raises(ValueError, match="`top` from 0 to the vocabulary of 12, got 13"):
            engine.score([3, 4], top=13)
        with pytest.raises(ValueError, match="`logprobs` of at most the vocabulary of 12, got 13"):
            engine.generate([3, 4], decoder="ntp", logprobs=13)


class TestPerplexity:
    """`sbd-engine perplexity`."""

    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        path = tmp_path / "text.txt"
        path.write_text(TEXT)
        return path

    @staticmethod
    def expected(engine: Engine, size: int) -> tuple[float, float, int]:
        """llama.cpp's: of each window, BOS first, the second half; and its error."""
        ids = engine.tokenizer.encode(TEXT)
        losses: list[float] = []
        for start in range(0, len(ids) - size + 1, size):
            window = [BOS_ID, *ids[start + 1 : start + size]]
            rows = log_softmax(engine.forward(window))
            losses += [-rows[i, window[i + 1]] for i in range(size // 2, size - 1)]
        exact = np.array(losses)
        value = np.exp(exact.mean())
        variance = (exact**2).mean() - exact.mean() ** 2
        return value, value * np.sqrt(variance / (len(exact) - 1)), len(exact)

    @pytest.mark.parametrize("size", [64, 65])
    def test_figures(
        self,
        size: int,
        text: Path,
        engine: Engine,
        model: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        done = run_here(capsys, "perplexity", model, text, "-c", size, "--json")
        report = json.loads(done.stdout)
        value, error, count = self.expected(engine, size)
        assert report["perplexity"] == pytest.approx(value, rel=1e-4)
        assert report["error"] == pytest.approx(error, rel=1e-3)
        assert (report["tokens"], report["n_ctx"]) == (count, size)
        assert report["windows"] == len(engine.tokenizer.encode(TEXT)) // size
        shown = run_here(capsys, "perplexity", "-m", model, text, "-c", size).stdout.decode()
        assert f"perplexity {report['perplexity']:.4f} +/- {report['error']:.4f}, " in shown
        assert f"{count} tokens in {report['windows']} windows of {size}\n" in shown

    def test_a_short_text_is_one_window(
        self,
        text: Path,
        engine: Engine,
        model: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        length = len(engine.tokenizer.encode(TEXT))
        report = json.loads(run_here(capsys, "perplexity", model, text, "--json").stdout)
        assert report["perplexity"] == pytest.approx(self.expected(engine, length)[0], rel=1e-4)
        assert (report["windows"], report["n_ctx"]) == (1, length)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
        piped = json.loads(run_here(capsys, "perplexity", model, "-", "--json").stdout)
        assert piped == {**report, "file": "-"}
        text.write_text("ab")
        least = json.loads(run_here(capsys, "perplexity", model, text, "--json").stdout)
        assert (least["tokens"], least["error"]) == (1, None)
        done = run_here(capsys, "perplexity", model, text)
        assert done.stdout.decode().endswith(", 1 tokens in 1 window of 3\n")

    def test_the_demo_model_knows_python(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "text.txt"
        values = []
        for text in ("def add(a, b):\n    return a + b\n" * 3, "Zwölf Boxkämpfer jagen Viktor.\n"):
            path.write_text(text)
            values.append(json.loads(run_here(capsys, "perplexity", path, "--json").stdout))
        assert values[0]["model"] == "demo.bin"
        assert values[0]["perplexity"] < 5 < 50 < values[1]["perplexity"]

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["missing.txt"], "missing.txt: no such file"),
            (["/"], "/: cannot be read"),
            (["{text}", "-c", 0], "expected --n-ctx >= 1, got 0"),
            (["{text}", "-c", 2], "expected --n-ctx 3 at least, got 2"),
            (["{text}", "-c", 10**6], "--n-ctx must be between 1 and the model's 512"),
            (["{empty}"], "expected a text of 3 tokens at least, got 1"),
            (["{binary}"], "expected UTF-8 text, got byte 0xff at offset 0"),
            (["x", "y"], "expected [MODEL] FILE, got 3 paths"),
            (["{text}", "-m", "other.bin"], "expected the model as MODEL or --model, got both"),
            (["{text}", "--threads", 0], "expected --threads >= 1, got 0"),
        ],
    )
    def test_bad_input(
        self,
        arguments: list[Any],
        complaint: str,
        text: Path,
        model: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
        empty.write_text("")
        binary.write_bytes(b"\xff")
        names = {"{text}": text, "{empty}": empty, "{binary}": binary}
        line = [names.get(each, each) for each in arguments]
        check_error(run_here(capsys, "perplexity", model, *line), complaint)

    def test_no_text_and_no_tokenizer(self, capsys: pytest.CaptureFixture[str]) -> None:
        check_error(run_here(capsys, "perplexity"), "FILE")

    def test_progress_on_a_terminal(self, text: Path, model: Path) -> None:
        shown = on_a_terminal("perplexity", model, text, "-c", 32)
        assert "perplexity " in shown

    def test_interrupted(
        self,
        text: Path,
        model: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What was read until then counts, and the exit code is 130."""
        call = ("perplexity", model, text, "-c", 16, "--json")
        score, begun = Engine.score, 0

        def interrupted(self: Engine, *arguments: Any) -> Any:
            nonlocal begun
            begun += 1
            if begun == 4:
                raise KeyboardInterrupt
            return score(self, *arguments)

        monkeypatch.setattr(Engine, "score", interrupted)
        done = run_here(capsys, *call)
        report = json.loads(done.stdout)
        assert (done.returncode, report["windows"], report["tokens"]) == (130, 3, 3 * 7)
        assert done.stderr.startswith(b"note: interrupted after 3 of ")
        begun = 3
        done = run_here(capsys, *call)
        assert json.loads(done.stdout)["perplexity"] is None
        begun = 3
        assert run_here(capsys, *call[:-1]).stdout == b""
