"""`python -m training.finetune`: a fresh checkpoint, tuned, converted and run; and bad input."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.distributed.checkpoint import FileSystemReader  # noqa: E402

from sbd_engine import Engine  # noqa: E402
from training import command, finetune, interruption  # noqa: E402
from training.checkpoint import (  # noqa: E402
    add_lora,
    choose_mask_token,
    load_model,
    lora_scale,
    merge_lora,
    open_base,
    write_model,
)
from training.trainer import Recipe, alone_in  # noqa: E402

from .checkpoints import convert_quietly, edit_json, write_checkpoint  # noqa: E402

OPTIONS = ["--length", "64", "--batch-size", "2", "--warmup-steps", "2", "--no-bfloat16"]
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def write_data(folder: Path) -> Path:
    """Counting: 400 short tasks, and a page of plain text."""
    folder.mkdir()
    tasks = [{"prompt": f"{i}:", "answer": f" {i} {i + 1} {i + 2}"} for i in range(400)]
    (folder / "tasks.jsonl").write_text("\n".join(json.dumps(task) for task in tasks))
    (folder / "page.txt").write_text(" ".join(map(str, range(90))))
    return folder


def tune(model: Path, data: Path, out: Path, *options: str) -> int:
    """The command's exit code."""
    arguments = ["--model", str(model), "--data", str(data), "--out", str(out), *OPTIONS, *options]
    with pytest.raises(SystemExit) as exit:
        finetune.main(arguments)
    return int(exit.value.code or 0)


def last_loss(out: Path) -> dict[str, float]:
    point: dict[str, float] = json.loads((out / "training.json").read_text())["loss"][-1]
    return point


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"vocab_size": 305, "tie_word_embeddings": False}),  # grows for its mask token
        ("qwen2", {"tie_word_embeddings": False}),  # has unused rows: the mask token takes one
        ("qwen3", {"vocab_size": 305, "tie_word_embeddings": True}),
    ],
)
def test_tuned_converted_and_run(
    model_type: str, changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a checkpoint without a mask token, by the commands alone, to text decoded in blocks; the
    engine then computes what the trained model does."""
    base = write_checkpoint(tmp_path / "base", model_type, mask_token=None, **changes)
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    options = ["--mask-token", "<|hole|>", "--learning-rate", "3e-3", "--steps", "40"]
    assert tune(base, data, out, *options) == 0
    curve = json.loads((out / "training.json").read_text())["loss"]
    assert curve[-1]["ntp"] < 0.7 * curve[0]["ntp"]
    assert curve[-1]["matp"] < curve[0]["matp"]
    assert (out / "loss.png").exists()
    assert "40 steps" in capsys.readouterr().out

    config = json.loads((out / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    mask = tokenizer.convert_tokens_to_ids("<|hole|>")
    assert (config["mask_token_id"], config["block_size"]) == (mask, 16)
    convert_quietly(out, tmp_path / "model.bin", type="f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        assert engine.config["sbd.decoders"] == ["sbd_lossless", "sbd", "ntp"]
        done = engine.generate("7:", max_tokens=12)
        assert done.tokens and mask not in done.tokens

        prompt = tokenizer("41: 41 42")["input_ids"]
        ids = [*prompt, *[mask] * 16]
        seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        seen[len(prompt) :] = True
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids]), attention_mask=seen[None, None])
        actual = engine.forward(ids, block=16)
        np.testing.assert_allclose(actual, expected.logits[0].numpy(), rtol=0, atol=1e-3)


def test_next_tokens_alone_decode_as_such(tmp_path: Path) -> None:
    """What was never taught to fill blocks has no block size, and NTP is its file's default; though
    the checkpoint that it began with had one."""
    base = write_checkpoint(tmp_path / "base", "qwen3")
    edit_json(base / "config.json", block_size=8)
    data, out = write_data(tmp_path / "data"), tmp_path / "out"
    assert tune(base, data, out, "--objective", "ntp", "--steps", "1") == 0
    assert json.loads((out / "config.json").read_text()).get("block_size") is None
    convert_quietly(out, tmp_path / "model.bin", type="f32")
    with Engine(tmp_path / "model.bin") as engine:
        assert engine.config["sbd.decoders"] == ["ntp", "sbd"]
        done = engine.generate("7:", max_tokens=4)
        assert done.stats.nfe == len(done.tokens)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", "qwen3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("texts") / "data")


def test_checkpointing_and_steps_from_epochs(base: Path, data: Path, tmp_path: Path) -> None:
    """Computing activations twice changes nothing; half an epoch is half the sequences."""
    assert tune(base, data, tmp_path / "plain", "--epochs", "0.1") == 0
    assert tune(base, data, tmp_path / "twice", "--epochs", "0.1", "--checkpointing") == 0
    assert last_loss(tmp_path / "plain") == last_loss(tmp_path / "twice")
    texts = 400 * 14 + 350  # about so many tokens
    assert last_loss(tmp_path / "plain")["step"] == pytest.approx(0.1 * texts / 128, rel=0.5)


def test_lora_trains_its_adapter_alone_and_is_merged(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """And it, too, is resumed to the bit: the warmup's rate does not depend on the steps."""
    options = ["--lora-rank", "4", "--learning-rate", "1e-1", "--warmup-steps", "50"]
    assert tune(base, data, tmp_path / "unbroken", *options, "--steps", "8") == 0
    assert tune(base, data, tmp_path / "out", *options, "--steps", "4") == 0
    assert tune(base, data, tmp_path / "out", *options, "--steps", "8") == 0
    unbroken, resumed = (tmp_path / name / "model.safetensors" for name in ("unbroken", "out"))
    assert unbroken.read_bytes() == resumed.read_bytes()
    before = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != ("_proj" in name), name
    (resume,) = (tmp_path / "out").glob("resume-*")
    held = FileSystemReader(resume).read_metadata().state_dict_metadata
    weights = [name for name in held if name.startswith("model.")]
    assert weights and all("lora_" in name for name in weights)


def test_merged_lora_is_the_adapted_model(base: Path, tmp_path: Path) -> None:
    opened = open_base(base)
    choose_mask_token(opened, None)
    model = load_model(opened, "eager", torch.float32, len(opened.tokenizer))
    add_lora(model, 4)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    ids = torch.arange(20)[None]
    write_model(model, model.state_dict(), torch.float32, tmp_path)
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    state = {"w.base_layer.weight": torch.eye(2), "w.base_layer.bias": torch.ones(2)}
    assert merge_lora(state, 1.0).keys() == {"w.weight", "w.bias"}
    assert lora_scale(merged) == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [304, 320])
def test_a_new_mask_token_begins_as_the_mean(rows: int, tied: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path, "qwen3", mask_token=None, vocab_size=rows, tie_word_embeddings=tied
    )
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    base = open_base(folder)
    tokens = len(base.tokenizer)
    assert choose_mask_token(base, "<|hole|>") == tokens == 304
    model = load_model(base, "eager", torch.float32, tokens)
    for old, new in (
        (before.get_input_embeddings(), model.get_input_embeddings()),
        (before.get_output_embeddings(), model.get_output_embeddings()),
    ):
        mean = old.weight[:304].mean(dim=0)
        torch.testing.assert_close(new.weight[304], mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(new.weight[:304], old.weight[:304])
    assert model.config.vocab_size == new.weight.shape[0] == {304: 312, 320: 320}[rows]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert base.tokenizer.mask_token_id == 304


def test_a_mask_token_that_is_there_is_kept(tmp_path: Path) -> None:
    """In the configuration, in the tokenizer, or named: no row changes."""
    folder = write_checkpoint(tmp_path, "qwen3", mask_token=None)
    assert choose_mask_token(open_base(folder), None) == 303  # the tokenizer has a <|mask|>
    edit_json(folder / "config.json", mask_token_id=302)
    base = open_base(folder)
    before = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert choose_mask_token(base, None) == 302
    model = load_model(base, "eager", torch.float32, len(base.tokenizer))
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert choose_mask_token(open_base(folder), "<|mask|>") == 303


@pytest.mark.parametrize(
    ("options", "config", "says"),
    [
        (["--length", "600"], {}, "--length is 600, expected at most 512"),
        (["--block-size", "65"], {}, "--block-size is 65, expected at most --length, 64"),
        (["--batch-size", "0"], {}, "Invalid value for '--batch-size'"),
        (
            ["--micro-batch-size", "3"],
            {},
            "expected a multiple of 1 processes x micro_batch_size 3",
        ),
        (
            ["--objective", "ntp", "--block-size", "8"],
            {},
            "--block-size has no effect with --objective ntp",
        ),
        (["--objective", "mlm"], {}, "--objective is 'mlm', expected sbd or ntp"),
        (["--lora-rank", "-1"], {}, "Invalid value for '--lora-rank'"),
        (["--mask-token", "<|eos|>"], {}, "is the tokenizer's EOS or BOS token: choose another"),
        (["--learning-rate", "nan"], {}, "--learning-rate is nan, expected a number above 0"),
        (["--weight-decay", "-1"], {}, "--weight-decay is -1.0, expected 0 or more"),
        (["--gamma", "1"], {}, "No such option: --gamma"),
        (
            [],
            {"mask_token_id": 999},
            "mask_token_id is 999, expected less than the vocabulary's 320",
        ),
        ([], {"mask_token_id": 302}, "config.json's mask_token_id is 302, the tokenizer's 303"),
        ([], {"model_type": "gpt2"}, "model_type is 'gpt2', expected one of llama, qwen2, qwen3"),
        (["--data", "nowhere"], {}, "nowhere: no such file or folder"),
        (["--model", "nowhere"], {}, "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str],
    config: dict[str, Any],
    says: str,
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = base
    if config:
        model = write_checkpoint(tmp_path / "spoilt", "qwen3")
        edit_json(model / "config.json", **config)
    assert tune(model, data, tmp_path / "out", "--steps", "1", *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_weights_or_onto_itself(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(base, data, base) == 2
    assert "expected a new folder" in capsys.readouterr().err
    empty = write_checkpoint(tmp_path / "empty", "qwen3")
    (empty / "model.safetensors").unlink()
    assert tune(empty, data, tmp_path / "out") == 2
    assert "weights not to be loaded" in capsys.readouterr().err
    (empty / "config.json").unlink()
    assert tune(empty, data, tmp_path / "out") == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_folder_of_another_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its settings were others, it is in use, or its checkpoint is no run's: one line each."""
    out = tmp_path / "out"
    assert tune(base, data, out, "--steps", "1", "--batch-size", "1") == 0
    before = (out / "model.safetensors").read_bytes()
    options = ["--steps", "3", "--batch-size", "2", "--learning-rate", "1"]
    same = ["--steps", "1", "--batch-size", "1"]
    for more, says in (
        (options, "--steps was 1, is 3; --batch-size was 1, is 2; --learning-rate was 1e-05, is"),
        ([*same, "--block-size", "8"], "--block-size was (2, 16), is (2, 8);"),
        ([*same, "--data", str(data / "page.txt")], "--data is another;"),
    ):
        assert tune(base, data, out, *more) == 2
        (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("error: "))
        assert f"error: {out} belongs to another run: {says}" in line
        assert len(line) < 250 + len(str(out))
    with alone_in(out):
        assert tune(base, data, out, *options) == 2
    assert "is in use by another run: wait for its end" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before

    theirs = write_checkpoint(tmp_path / "theirs", "qwen3")
    assert tune(base, data, theirs) == 2
    assert "holds a checkpoint that is no run's: expected a new folder" in capsys.readouterr().err


def test_data_without_a_word_to_teach(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    assert tune(base, tmp_path / "empty.txt", tmp_path / "out") == 2
    assert "no document with a token to teach" in capsys.readouterr().err


def test_a_run_that_fails_says_so_and_keeps_its_last_save(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--learning-rate", "1e30", "--steps", "4", "--save-every", "1"]
    assert tune(base, data, tmp_path / "out", *options) == 2
    assert "the loss is not finite: lower the learning rate" in capsys.readouterr().err
    (resume,) = (tmp_path / "out").glob("resume-*")
    assert int(resume.name.removeprefix("resume-")) < 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_saved_and_goes_on(
    number: int,
    code: int,
    base: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Behind the step at hand, long before the next regular save; and nothing is lost by it."""

    def report(point: dict[str, float], recipe: Recipe) -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # as torchrun passes on what it got

    handler = signal.getsignal(number)
    options = ["--steps", "12", "--save-every", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(command, "print_progress", report)
        assert tune(base, data, tmp_path / "broken", *options) == code
    said = capfd.readouterr().err
    assert "interrupted: saving behind this step" in said
    assert f"step 11 of 12 is saved in {tmp_path / 'broken'}: the same command goes on" in said
    assert "Traceback" not in said
    assert signal.getsignal(number) is handler
    assert tune(base, data, tmp_path / "broken", *options) == 0
    assert tune(base, data, tmp_path / "unbroken", *options) == 0
    assert last_loss(tmp_path / "broken") == last_loss(tmp_path / "unbroken")


def test_a_second_interruption_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "GRACE", 0.0)
    with interruption.Interruption(speaks=False) as interrupted:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_is_ignored_stays_ignored() -> None:
    """As behind nohup, or in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.Interruption(speaks=False) as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
            assert not interrupted.asked()
    finally:
        signal.signal(signal.SIGINT, before)
