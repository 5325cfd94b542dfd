"""Train the embedded demo model: `python -m training.demo --out DIR`. Run again to resume.

Two runs, the second from the weights of the first: next tokens alone (`DIR/ntp`), then Set Block
Decoding (`DIR/sbd`). Both are transformers checkpoints, with the run's record in `training.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.multiprocessing.spawn import spawn
from transformers import Qwen3Config, Qwen3ForCausalLM

from training.demo.corpus import (
    BATCH_SIZE,
    EOS,
    LENGTH,
    MASK,
    DemoData,
    demo_tokenizer,
    token_id,
)
from training.demo.replicas import share_gradients
from training.trainer import Recipe, Trainer, print_progress

STEPS = (3600, 5600)
LATE_FROM = {"ntp": 3600, "sbd": 4000}  # from these steps on the data have the late mix
PROCESSES = 2
VOCAB_SIZE = 2048
BLOCK_SIZE = 8
CONTEXT = 1024


def demo_config(tokenizer: Tokenizer) -> Qwen3Config:
    """5.2 M parameters. Every width is a multiple of 32, so that all of it can be quantised."""
    eos = token_id(tokenizer, EOS)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        mask_token_id=token_id(tokenizer, MASK),
        block_size=BLOCK_SIZE,
        attn_implementation="eager",  # compiled, 1.5 times as fast on a CPU as sdpa
    )
    return Qwen3Config(**settings)


def write_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """`tokenizer.json` and its configuration. No BOS is added: documents start bare."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "mask_token": MASK,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def recipes(steps: tuple[int, int], seed: int) -> dict[str, Recipe]:
    shared: dict[str, Any] = dict(
        length=LENGTH,
        batch_size=BATCH_SIZE // PROCESSES,
        micro_batch_size=BATCH_SIZE // PROCESSES,
        noisy_multiple=32,
        warmup_steps=100,
        final_learning_rate=0.02,
    )
    ntp = Recipe(steps[0], objective="ntp", learning_rate=3e-3, cooldown=0.5, seed=seed, **shared)
    sbd = Recipe(steps[1], learning_rate=2e-3, cooldown=0.5, seed=seed + 1, **shared)
    return {"ntp": ntp, "sbd": sbd}


def train(rank: int, args: argparse.Namespace, address: str) -> None:
    """What process `rank` does: all of it, on its share of each step's sequences."""
    torch.set_num_threads(1)
    tokenizer = demo_tokenizer(args.seed, VOCAB_SIZE)
    torch.manual_seed(args.seed)
    model: Any = Qwen3ForCausalLM(demo_config(tokenizer))
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    share_gradients(model, rank, PROCESSES, address)
    for stage, recipe in recipes(args.steps, args.seed).items():
        # Each stage goes on from the weights in memory, which the one before it trained or loaded.
        data = DemoData(tokenizer, recipe.seed, LATE_FROM[stage], rank, PROCESSES)
        trainer = Trainer(model, recipe, data, args.out / stage, settings=data.settings)
        if rank == 0:
            write_tokenizer(tokenizer, trainer.out)
        else:
            trainer.save = lambda: None  # type: ignore[method-assign]
        trainer.run(args.save_every, report=print_progress if rank == 0 else lambda *_: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for both checkpoints")
    parser.add_argument("--steps", type=int, nargs=2, default=STEPS, metavar=("NTP", "SBD"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start: Any = spawn  # untyped
        start(train, (args, f"{folder}/meeting"), PROCESSES)
