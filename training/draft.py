"""Train an adapter that drafts for a frozen model: `python -m training.draft --help`."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from convert import ConvertError, convert
from convert.checkpoint import read_json
from training import options
from training.adapter_file import write_adapter
from training.answers import (
    Answer,
    LikeLengths,
    held_out,
    make_answers,
    measured_by,
    read_answers,
    write_prompts,
)
from training.checkpoint import add_lora, checkpoint_fingerprint
from training.command import ending, main_of, say, speaks, train
from training.draft_objective import DraftObjective
from training.draft_trainer import DraftTrainer
from training.errors import TrainingError
from training.model_file import ModelFile, load_model, open_model_file
from training.parallel import join
from training.trainer import Recipe, alone_in

# What a run depends on, by the option that says it.
FLAGS = {name: f"--{name.replace('_', '-')}" for name in Recipe.__dataclass_fields__}
FLAGS |= {"block_sizes": "--block-size", "base": "--model", "data": "the answers"}
FLAGS |= {name: f"--{name}" for name in ("rank", "alpha")} | {"slot_decay": "--slot-decay"}
FLAGS["measured"] = "the held-out answers"
MEASURED = 128  # held-out answers that drafts are measured by, at most
HELD_OUT_PROMPTS = "held_out.jsonl"  # theirs, in the run's folder
TYPES = {"bfloat16": "bf16", "float16": "f16"}  # of a converted checkpoint; others are F32


def draft(
    model: Annotated[
        Path, typer.Option(help="A model file (GGUF), or a Hugging Face checkpoint's folder.")
    ],
    out: Annotated[Path, typer.Option(help="The adapter's file.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts: a .txt file (one a line), a .jsonl file (prompt, perhaps family), or a "
            "folder of these. sbd-engine has the model answer them first."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="Instead: what `sbd-engine generate --out` wrote, a file or a folder."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="The run's folder; a run there is continued. Default: OUT with .run."),
    ] = None,
    held_out_kind: Annotated[
        list[str] | None,
        typer.Option(
            "--held-out", help="A family of prompts to measure by, never trained on; repeatable."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(help="Prompts in the chat template. Default: where the model has one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Of the sampled answers, beside a greedy one each. 0: none.")
    ] = 0.7,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter's matrices.")] = 16,
    alpha: Annotated[
        float | None, typer.Option(help="The adapter counts alpha / rank. Default: twice the rank.")
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=2, max=32, help="Slots that are drafted at once, the first included.")
    ] = 8,
    slot_decay: Annotated[
        float, typer.Option(help="What a slot weighs in the loss beside the one before it.")
    ] = 0.8,
    length: Annotated[
        int, typer.Option(min=4, help="Tokens of a prompt and its answer; longer ones are cut.")
    ] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers per step, in all.")] = 16,
    micro_batch_size: Annotated[
        int, typer.Option(min=1, help="Answers per forward, of like length.")
    ] = 8,
    epochs: Annotated[float, typer.Option(help="How often to go through the answers.")] = 3.0,
    steps: options.Steps = None,
    learning_rate: options.LearningRate = 1e-3,
    warmup_steps: options.WarmupSteps = 20,
    weight_decay: options.WeightDecay = 0.0,
    bfloat16: Annotated[
        bool | None,
        typer.Option(help="Weights and products in bfloat16. Default: where that is fast."),
    ] = None,
    seed: options.Seed = 0,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps from save to save; each measures the drafts.")
    ] = 50,
    patience: Annotated[
        int, typer.Option(min=0, help="Saves without a better adapter until it ends. 0: all steps.")
    ] = 8,
    debug: options.Debug = False,
) -> None:
    """Train a draft adapter: a small file that lets a model draft several tokens in one forward,
    which it then verifies, so that its text stays what it was. The same command again continues a
    run, and ends with the same file.
    """
    with ending(debug, FLAGS) as stack:
        run = run or out.with_suffix(".run")
        alpha = 2.0 * rank if alpha is None else alpha
        _check(out, run, prompts, answers, learning_rate, epochs, slot_decay, alpha, temperature)
        if speaks():
            stack.enter_context(alone_in(run))
        file = _model_file(model, run)
        if length > file.context:
            raise TrainingError(
                f"--length is {length}, expected at most {file.context}, the context"
            )
        if prompts is not None:
            in_template = ["--chat"] if (file.chats if chat is None else chat) else []
            common = ["--max-tokens", str(max_tokens), "--seed", str(seed), *in_template]
            ways = {"greedy": common}
            if temperature > 0:
                ways["sampled"] = [*common, "--temperature", str(temperature)]
            answers = run / "answers"
            make_answers(file.path, prompts, answers, ways)
        assert answers is not None
        trained, measured = _answers(answers, length, file, held_out_kind or [])

        device = join()
        bfloat16 = _fast_in_bfloat16(device) if bfloat16 is None else bfloat16
        world = int(os.environ.get("WORLD_SIZE", "1"))
        data = LikeLengths(trained, length, batch_size, micro_batch_size * world, seed)
        recipe = Recipe(
            steps=steps or max(1, math.ceil(epochs * len(data) / batch_size)),
            length=length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            objective="draft",
            block_sizes=(block_size, block_size),
            noisy_multiple=128 if device.type == "cuda" else 1,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            bfloat16=bfloat16,
            seed=seed,
        )
        settings = {
            "base": file.fingerprint,
            "rank": rank,
            "alpha": alpha,
            "slot_decay": slot_decay,
            "measured": _fingerprint(measured),
        }
        torch.manual_seed(seed)  # a LoRA begins with random numbers
        attention = "flex_attention" if device.type == "cuda" else "sdpa"
        dtype = torch.bfloat16 if bfloat16 else torch.float32
        network = load_model(file, attention, dtype)
        add_lora(network, rank, alpha)
        trainer = DraftTrainer(
            DraftObjective(network, block_size, slot_decay, file.mask_token_id),
            recipe,
            data,
            run,
            settings,
            device,
            measured,
            out,
            save_every,
            patience,
            lambda path, state, *priors: write_adapter(
                path, file, state, alpha, block_size, *priors
            ),
        )
        if speaks():
            write_prompts(run / HELD_OUT_PROMPTS, measured)
        if not trainer.done:
            seconds, memory = trainer.trial()
            say(
                f"about {_shown(seconds)} for {recipe.steps - trainer.step} steps of {batch_size} "
                f"answers, {memory / 2**30:.1f} GiB of memory; {sum(_lengths(trained))} tokens in "
                f"{len(trained)} answers, {len(measured)} held out"
            )
            train(trainer, save_every)
        if speaks():
            print(_ending(trainer, out))


def _check(
    out: Path,
    run: Path,
    prompts: Path | None,
    answers: Path | None,
    learning_rate: float,
    epochs: float,
    slot_decay: float,
    alpha: float,
    temperature: float,
) -> None:
    if (prompts is None) == (answers is None):
        raise TrainingError("expected either --prompts or --answers")
    if prompts is not None and "WORLD_SIZE" in os.environ:
        raise TrainingError(
            "several processes cannot make the answers: make them first with sbd-engine generate, "
            "and give --answers"
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise TrainingError(f"--out {out}: expected a file in a folder that is there")
    if run.exists() and not run.is_dir():
        raise TrainingError(f"{run}: expected a new folder, or that of an earlier run")
    positive = {"learning-rate": learning_rate, "epochs": epochs, "alpha": alpha}
    for option, value in (positive | {"slot-decay": slot_decay}).items():
        if not 0 < value < math.inf:
            raise TrainingError(f"--{option} is {value}, expected a number above 0")
    if not 0 <= temperature < math.inf:
        raise TrainingError(f"--temperature is {temperature}, expected 0 or more")


def _model_file(model: Path, run: Path) -> ModelFile:
    """The model file; a checkpoint becomes one, in its own type, in the run's folder."""
    if not model.is_dir():
        return open_model_file(model)
    name = f"model-{checkpoint_fingerprint(model)[:8]}.gguf"
    file = run / name
    if not file.exists():
        if not speaks():
            raise TrainingError(f"{model}: convert it first, and give the model file to torchrun")
        try:
            convert(model, file, type=_type_of(model), warn=lambda line: say(f"warning: {line}"))
        except ConvertError as error:
            raise TrainingError(f"{model}: {error}") from None
    return open_model_file(file)


def _type_of(checkpoint: Path) -> str:
    config = read_json(checkpoint / "config.json")
    return TYPES.get(str(config.get("dtype") or config.get("torch_dtype")), "f32")


def _answers(
    path: Path, length: int, file: ModelFile, kinds: list[str]
) -> tuple[list[Answer], list[Answer]]:
    found = read_answers(path, length, int(file.config["vocab_size"]))
    trained, left = held_out(found, kinds)
    return trained, measured_by(left, MEASURED)


def _lengths(answers: list[Answer]) -> list[int]:
    return [len(answer.tokens) for answer in answers]


def _fingerprint(answers: list[Answer]) -> str:
    digest = hashlib.sha256()
    for answer in answers:
        digest.update(f"{answer.kind} {len(answer.tokens)} ".encode() + answer.tokens.tobytes())
    return digest.hexdigest()


def _fast_in_bfloat16(device: torch.device) -> bool:
    """On a CPU: where it has products of bfloat16; elsewhere they take longer than float32's."""
    if device.type == "cuda":
        return True
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(has())


def _shown(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"


def _ending(trainer: DraftTrainer, out: Path) -> str:
    best: dict[str, Any] = trainer.best or {}
    early = ", stopped early" if trainer.stopped_early else ""
    kinds = ", ".join(f"{kind} {prefix:.2f}" for kind, prefix in best["by_kind"].items())
    slots = "/".join(f"{100 * chance:.0f}" for chance in best["acceptance"][1:])
    return (
        f"{out}: of step {best['step']} of {trainer.step}{early}, {best['tokens']} tokens: drafts "
        f"on held-out ones agree for {best['prefix']:.2f} tokens behind a known one ({kinds}), "
        f"by slot, where those before agree: {slots} %, and for {best['prefix_fused']:.2f} behind "
        "one that their own forward decides"
    )


main = main_of(draft)

if __name__ == "__main__":
    main()
