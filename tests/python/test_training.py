"""The training loop: what a step may not depend on, resuming, and what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from training.errors import TrainingError  # noqa: E402
from training.examples import Example, Sequence  # noqa: E402
from training.plot_loss import plot_loss  # noqa: E402
from training.trainer import Recipe, Trainer, resume_folders  # noqa: E402

from .checkpoints import random_model  # noqa: E402

RECIPE = Recipe(
    steps=10,
    length=48,
    batch_size=4,
    micro_batch_size=2,
    block_sizes=(2, 8),
    noisy_multiple=16,
    learning_rate=2e-3,
    warmup_steps=2,
    cooldown=0.4,
)
pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Counting:
    """Documents that count on from a random number; each step's are drawn anew."""

    fingerprint = "counting"

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop

    def step(self, step: int) -> list[Sequence]:
        if step == self.stop:
            raise KeyboardInterrupt
        rng = Random(step)
        return [[self._example(rng) for _ in range(3)] for _ in range(RECIPE.batch_size)]

    def _example(self, rng: Random) -> Example:
        first, size = rng.randint(2, 200), rng.randint(4, 16)
        return Example(list(range(first, first + size)), rng.randint(0, 3))


def run(out: Path, recipe: Recipe = RECIPE, stop: int | None = None, **config: Any) -> Trainer:
    """A run in `out`; `stop` interrupts it before that step."""
    model = random_model("qwen3", tie_word_embeddings=True, mask_token_id=1, **config)
    trainer = Trainer(model, recipe, Counting(stop), out)
    if stop is None:
        trainer.run(save_every=4, report_every=3)
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(save_every=4, report_every=3)
    return trainer


def assert_same_weights(a: Any, b: Any) -> None:
    theirs = b.state_dict()
    for name, weight in a.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path) -> None:
    """To the bit, dropout included."""
    unbroken = run(tmp_path / "unbroken", attention_dropout=0.1)
    run(tmp_path / "broken", stop=6, attention_dropout=0.1)  # saved at 4, between two points
    resumed = run(tmp_path / "broken", attention_dropout=0.1)
    assert resumed.curve == unbroken.curve
    assert [point["step"] for point in resumed.curve] == [3, 6, 9, 10]
    assert_same_weights(resumed.model, unbroken.model)

    # The folder is a checkpoint that transformers opens, of these very weights; no more is left.
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "broken")
    assert again.config.mask_token_id == 1
    assert_same_weights(again, unbroken.model)
    assert [folder.name for folder in resume_folders(tmp_path / "broken")] == ["resume-10"]
    assert not (tmp_path / "broken" / "saving").exists()
    assert json.loads((tmp_path / "broken" / "training.json").read_text())["step"] == 10
    plot_loss(tmp_path / "broken" / "training.json", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_save_that_was_cut_short_is_not_resumed(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken")
    run(tmp_path / "broken", stop=6)
    (tmp_path / "broken" / "saving" / "resume").mkdir(parents=True)
    assert run(tmp_path / "broken").curve == unbroken.curve


def test_micro_batches_do_not_change_a_step(tmp_path: Path) -> None:
    """Their number of labels differs, so a mean of means would."""
    exact = dataclasses.replace(RECIPE, bfloat16=False)
    whole = run(tmp_path / "whole", dataclasses.replace(exact, micro_batch_size=4))
    parts = run(tmp_path / "parts", dataclasses.replace(exact, micro_batch_size=1))
    for a, b in zip(whole.curve, parts.curve, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    theirs = parts.model.state_dict()
    for name, weight in whole.model.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=2e-5, msg=name)


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    run(tmp_path, stop=5)
    model = random_model("qwen3", tie_word_embeddings=True, mask_token_id=1)

    def resume(data: Counting | None = None, settings: dict[str, Any] | None = None, **recipe: Any):
        changed = dataclasses.replace(RECIPE, **recipe)
        return Trainer(model, changed, data or Counting(), tmp_path, settings=settings)

    other = Counting()
    other.fingerprint = "0" * 64
    changes: list[tuple[dict[str, Any], str]] = [
        ({"steps": 4}, "steps was 10, is 4"),  # would have cooled down by now
        ({"seed": 1, "batch_size": 8}, "batch_size was 4, is 8; seed was 0, is 1"),
        ({"data": other}, "data was counting, is 0000"),
        ({"settings": {"lora_rank": 4}}, "lora_rank was None, is 4"),
    ]
    for wrong, says in changes:
        with pytest.raises(TrainingError) as error:
            resume(**wrong)
        assert f"{tmp_path} belongs to another run: {says}" in str(error.value)
        assert str(error.value).endswith("; go on as it began, or in another folder")
    assert resume(steps=20).step == 4

    (resumable,) = resume_folders(tmp_path)
    for content in ("{", "[]", '{"recipe": {"steps": 9, "new": 1}}'):
        (resumable / "training.json").write_text(content)
        with pytest.raises(TrainingError, match="not of a run that this version can go on with"):
            resume()


def test_a_batch_is_whole_micro_batches(tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match="batch_size is 4, expected a multiple of 1 processes x "
    ):
        run(tmp_path, dataclasses.replace(RECIPE, micro_batch_size=3))


def test_learning_rate_warms_up_holds_and_cools_down() -> None:
    recipe = Recipe(100, learning_rate=1.0, warmup_steps=10, cooldown=0.5, final_learning_rate=0.02)
    rates = [recipe.learning_rate_at(step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:51] == pytest.approx([1.0] * 42)
    assert rates[75] == pytest.approx(0.51)
    assert rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize("objective", ["sbd", "ntp"])
def test_training_lowers_its_losses(objective: Any, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        RECIPE, steps=60, learning_rate=5e-3, bfloat16=False, objective=objective
    )
    curve = run(tmp_path, recipe).curve
    assert curve[-1]["ntp"] < 0.7 * curve[0]["ntp"]
    assert ("matp" in curve[0]) == (objective == "sbd")
    if objective == "sbd":
        assert curve[-1]["matp"] < 0.9 * curve[0]["matp"]
