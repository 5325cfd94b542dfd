"""Two processes of torchrun against one: each with half of every weight, or with all of a
frozen model's."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

from training import draft, finetune  # noqa: E402

from .checkpoints import convert_quietly, read_model, write_checkpoint  # noqa: E402

pytestmark = pytest.mark.xdist_group("torchrun")  # one server that its processes are forks of

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = "--length 48 --batch-size 4 --warmup-steps 50 --learning-rate 1e-2 --save-every 4"


def with_torchrun(arguments: list[str], module: ModuleType = finetune) -> None:
    """What `torchrun --standalone --nproc-per-node 2 -m module` does, but that its processes have
    imported torch when they start, which takes longer than what they do."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="test",
        max_restarts=0,
        start_method="forkserver",
    )
    preloaded = [draft.__name__, finetune.__name__, "transformers.models.qwen3.modeling_qwen3"]
    multiprocessing.set_forkserver_preload(preloaded)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(300)
    try:  # the server has the environment of its start
        with patch.dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"):
            elastic_launch(config, run_main)(module.__name__, arguments)
    finally:
        signal.alarm(0)


def too_long(*_: object) -> None:
    raise TimeoutError("the processes wait for each other")


def run_main(module: str, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        sys.modules[module].main(arguments)
    assert not exit.value.code


@pytest.mark.parametrize("kind", ["", "--lora-rank 4 --checkpointing"])
def test_two_processes_are_one(kind: str, tmp_path: Path) -> None:
    """The same curve and weights. With all weights trained, the two also stop in between and go on
    from what each saved: during the warmup the rate does not depend on the number of steps."""
    base = write_checkpoint(tmp_path / "base", "qwen3", tie_word_embeddings=not kind)
    tasks = [{"prompt": f"{i}:", "answer": f" {i} {i + 1} {i + 2}"} for i in range(100)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(task) for task in tasks))
    one, two = tmp_path / "one", tmp_path / "two"

    def arguments(out: Path, steps: int) -> list[str]:
        paths = ["--model", str(base), "--data", str(tmp_path / "data.jsonl"), "--out", str(out)]
        options = [*OPTIONS.split(), *kind.split(), "--no-bfloat16", "--steps", str(steps)]
        return [*paths, *options]

    run_main(finetune.__name__, arguments(one, 8))
    if not kind:
        with_torchrun(arguments(two, 4))
    with_torchrun(arguments(two, 8))

    curves = [json.loads((out / "training.json").read_text())["loss"] for out in (one, two)]
    assert [point["step"] for point in curves[1]] == [4, 8]
    for a, b in zip(*curves, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    theirs = weights(two)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-3, msg=name)


def weights(folder: Path) -> dict[str, Any]:
    return dict(transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_two_processes_draft_as_one(tmp_path: Path) -> None:
    """The same losses, measurements and adapter, of answers that share forwards in the same way."""
    write_checkpoint(tmp_path / "base", "qwen3", mask_token=None)
    model, answers = tmp_path / "model.gguf", tmp_path / "answers.jsonl"
    convert_quietly(tmp_path / "base", model, type="f32")
    common = {"options": {"temperature": 0}, "prompt_ids": [9, 8]}
    lines = [
        {"prompt": str(i), "tokens": [*range(i, i + 9 + i % 5)], **common} for i in range(8, 72)
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(out: str, side_by_side: int) -> list[str]:
        paths = ["--model", model, "--answers", answers, "--out", tmp_path / out]
        options = "--rank 4 --block-size 4 --batch-size 4 --warmup-steps 50 --save-every 3"
        options += f" --no-bfloat16 --micro-batch-size {side_by_side} --steps 6"
        return [*map(str, paths), *options.split()]

    run_main(draft.__name__, arguments("one.gguf", 2))
    with_torchrun(arguments("two.gguf", 1), draft)
    one, two = (
        json.loads((tmp_path / f"{name}.run" / "training.json").read_text())
        for name in ("one", "two")
    )
    assert [point["step"] for point in two["held_out"]] == [3, 6]
    for a, b in zip(one["loss"], two["loss"], strict=True):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert one["held_out"][0]["acceptance"] == two["held_out"][0]["acceptance"]
    theirs = read_model(tmp_path / "two.gguf")[1]
    for name, values in read_model(tmp_path / "one.gguf")[1].items():
        assert abs(values - theirs[name]).max() < 2e-3, name
