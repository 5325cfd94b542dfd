"""Train the embedded demo model: `python -m training.demo --out DIR`. Run again to resume."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from training.data import EOS, MASK, Corpus, demo_sources, token_id, train_tokenizer
from training.trainer import Recipe, Trainer

VOCAB_SIZE = 1024
BLOCK_SIZE = 16
CONTEXT = 1024


def demo_config(tokenizer: Tokenizer) -> Qwen3Config:
    """4.2 M parameters. Every width is a multiple of 32, so that all of it can be quantised."""
    eos = token_id(tokenizer, EOS)
    settings: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        mask_token_id=token_id(tokenizer, MASK),
        block_size=BLOCK_SIZE,
        attn_implementation="eager",  # on a CPU a step takes 0.75 of the time with sdpa
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save-every", type=int, default=200)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sources = demo_sources(args.seed)
    texts = (text for source in sources for text in source.documents)
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    write_tokenizer(tokenizer, args.out)
    corpus = Corpus(sources, tokenizer, args.seed)
    model: Any = Qwen3ForCausalLM(demo_config(tokenizer))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(steps=args.steps, seed=args.seed, cooldown=0.4)
    trainer = Trainer(model, recipe, corpus.batch, corpus.fingerprint, args.out)
    trainer.run(args.save_every)


if __name__ == "__main__":
    main()
