"""Turn a checkpoint into one that decodes in blocks: `python -m training.finetune --help`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from training import options
from training.checkpoint import (
    Base,
    add_lora,
    checkpoint_fingerprint,
    choose_mask_token,
    empty_model,
    load_model,
    open_base,
)
from training.command import ending, main_of, say, speaks, train
from training.errors import TrainingError
from training.examples import Example
from training.parallel import join
from training.plot_loss import plot_loss
from training.texts import Encoder, PackedTexts, read_records
from training.trainer import Recipe, Trainer, alone_in, described

# What a run depends on, by the option that says it.
FLAGS = {name: f"--{name.replace('_', '-')}" for name in Recipe.__dataclass_fields__}
FLAGS |= {"block_sizes": "--block-size", "mask_token_id": "the id of --mask-token"}
FLAGS |= {"base": "--model", "data": "--data", "lora_rank": "--lora-rank"}


def finetune(
    model: Annotated[Path, typer.Option(help="A Llama, Qwen2 or Qwen3 checkpoint: its folder.")],
    data: Annotated[Path, typer.Option(help="A .txt or .jsonl file, or a folder of these.")],
    out: Annotated[Path, typer.Option(help="The folder to write; a run there is continued.")],
    objective: Annotated[str, typer.Option(help="sbd, or ntp: next tokens alone.")] = "sbd",
    block_size: Annotated[
        int | None,
        typer.Option(
            min=2, max=1024, help="The largest block; each step draws 2 up to it. Default: 16."
        ),
    ] = None,
    mask_token: Annotated[
        str | None, typer.Option(help="Default: the checkpoint's, else a new one.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per sequence. Default: the context, at most 4096."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per step, over all processes.")
    ] = 16,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward.")] = 1,
    epochs: Annotated[float, typer.Option(help="How often to go through the data.")] = 1.0,
    steps: options.Steps = None,
    learning_rate: options.LearningRate = 1e-5,
    warmup_steps: options.WarmupSteps = 200,
    weight_decay: options.WeightDecay = 0.1,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Train a LoRA, merged at every save. 0: all weights.")
    ] = 0,
    checkpointing: Annotated[
        bool, typer.Option(help="Save memory: compute each layer's activations twice.")
    ] = False,
    bfloat16: Annotated[bool, typer.Option(help="Multiply matrices in bfloat16.")] = True,
    seed: options.Seed = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps from save to save.")] = 200,
    debug: options.Debug = False,
) -> None:
    """Fine-tune a checkpoint for Set Block Decoding. The same command again continues a run."""
    with ending(debug, FLAGS) as stack:
        device = join()
        base = open_base(model)
        length = length or min(4096, base.config.max_position_embeddings)
        if objective == "ntp" and block_size is not None:
            raise TrainingError("--block-size has no effect with --objective ntp: leave it out")
        block_size = block_size or 16
        _check(base, out, objective, length, block_size)
        for option, value in (("learning-rate", learning_rate), ("epochs", epochs)):
            if not 0 < value < math.inf:
                raise TrainingError(f"--{option} is {value}, expected a number above 0")
        if not 0 <= weight_decay < math.inf:
            raise TrainingError(f"--weight-decay is {weight_decay}, expected 0 or more")
        old_tokens = len(base.tokenizer)
        mask = choose_mask_token(base, mask_token)
        # What `convert` takes for a model that decodes in blocks by itself.
        base.config.block_size = block_size if objective == "sbd" else None
        texts = PackedTexts(_read(base, data, length, mask), length, batch_size, seed)
        epoch = texts.sequences_in_epoch(0) / batch_size
        recipe = Recipe(
            steps=steps or max(1, math.ceil(epochs * epoch)),
            length=length,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            objective="ntp" if objective == "ntp" else "sbd",
            block_sizes=(2, block_size),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            bfloat16=bfloat16,
            seed=seed,
        )
        settings = {
            "base": checkpoint_fingerprint(base.folder),
            "mask_token_id": mask,
            "lora_rank": lora_rank,
        }
        torch.manual_seed(seed)  # a LoRA begins with random numbers
        if speaks():
            stack.enter_context(alone_in(out))
        network = _network(base, device, old_tokens, lora_rank, checkpointing, bfloat16)
        trainer = Trainer(network, recipe, texts, out, base.dtype, settings, device)
        if speaks():
            base.tokenizer.save_pretrained(out)
        train(trainer, save_every)
        if speaks():
            plot_loss(out / "training.json", out / "loss.png")
            print(f"{out}: {recipe.steps} steps, {described(trainer.curve[-1])}")


def _check(base: Base, out: Path, objective: str, length: int, block_size: int) -> None:
    if out.resolve() == base.folder.resolve() or (out.exists() and not out.is_dir()):
        raise TrainingError(f"{out}: expected a new folder, or that of an earlier run")
    if objective not in ("sbd", "ntp"):
        raise TrainingError(f"--objective is {objective!r}, expected sbd or ntp")
    if any(out.glob("*.safetensors")) and not (out / "training.json").is_file():
        raise TrainingError(f"{out}: holds a checkpoint that is no run's: expected a new folder")
    context = base.config.max_position_embeddings
    if length > context:
        raise TrainingError(
            f"--length is {length}, expected at most {context}, the max_position_embeddings of "
            f"{base.folder}"
        )
    if block_size > length:
        raise TrainingError(f"--block-size is {block_size}, expected at most --length, {length}")


def _read(base: Base, data: Path, length: int, mask_token_id: int) -> list[Example]:
    encoder = Encoder(base.tokenizer, length, mask_token_id)
    examples = [e for record in read_records(data) for e in encoder.examples(record)]
    if not examples:
        raise TrainingError(f"{data}: no document with a token to teach")
    tokens = sum(len(example.tokens) for example in examples)
    say(f"{data}: {len(examples)} examples, {tokens} tokens")
    if encoder.cut or encoder.dropped:
        say(
            f"warning: {encoder.cut} answers cut at --length {length}, {encoder.dropped} "
            "documents left out: nothing of theirs to teach within it"
        )
    return examples


def _network(
    base: Base,
    device: torch.device,
    old_tokens: int,
    lora_rank: int,
    checkpointing: bool,
    bfloat16: bool,
) -> Any:
    """The model as it will be trained; of several processes the first alone has its weights."""
    attention = "flex_attention" if device.type == "cuda" else "sdpa"
    frozen = base.dtype if bfloat16 else torch.float32
    dtype = frozen if lora_rank else torch.float32
    if speaks():
        network = load_model(base, attention, dtype, old_tokens)
    else:
        network = empty_model(base, attention, dtype)
    if lora_rank:
        add_lora(network, lora_rank)
    if checkpointing:
        # transformers 5 has the first name, 4 the second.
        enable = getattr(network, "activation_checkpointing_enable", None)
        (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    return network


main = main_of(finetune)

if __name__ == "__main__":
    main()
