"""`sbd-engine inspect`: what a model file holds and how it will be decoded."""

from __future__ import annotations

import math
from typing import Annotated, Any

import typer

from ..sizes import shown
from . import options
from .options import one_line, print_json


def inspect(
    model: options.Model = None,
    model_flag: options.ModelFlag = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Show what a model file holds and how it will be decoded."""
    from .. import _core
    from ..model_file import model_file

    with model_file(options.one_model(model, model_flag)) as path:
        summary = summarise(path.name, path.stat().st_size, _core.read_gguf(path), tensors)
    if json:
        print_json(summary)
    else:
        _print_summary(summary)


def summarise(
    name: str, file_bytes: int, contents: dict[str, Any], list_tensors: bool
) -> dict[str, Any]:
    """The report, as `--json` prints it."""
    metadata, tensors = contents["metadata"], contents["tensors"]
    config, defaults = contents["model_config"], contents["defaults"]
    adapter = metadata.get("general.type") == "adapter"
    bytes_by_type: dict[str, int] = {}
    for _, dtype, _, size in tensors:
        bytes_by_type[dtype] = bytes_by_type.get(dtype, 0) + size
    summary: dict[str, Any] = {
        "file": name,
        "name": metadata.get("general.name"),
        "file_bytes": file_bytes,
        "parameters": sum(math.prod(shape) for _, _, shape, _ in tensors),
        "bytes_by_type": bytes_by_type,
        "architecture": metadata.get("general.architecture"),
        "adapter": _adapter(contents) if adapter else None,
        "model_config": config,
        "problem": None if adapter else contents["problem"],
        "tokenizer": _tokenizer(metadata),
        "chat_template": "tokenizer.chat_template" in metadata,
        "sbd": {key: value for key, value in metadata.items() if key.startswith("sbd.")},
        "decoders": _decoders(contents) if defaults else None,
        "defaults": defaults,
        "fingerprint": contents["fingerprint"],
        "n_tensors": len(tensors),
    }
    if list_tensors:
        summary["tensors"] = [
            {"name": name, "type": dtype, "shape": shape, "bytes": size}
            for name, dtype, shape, size in tensors
        ]
    return summary


def _decoders(contents: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file can run, first what `auto` takes, each with the defaults that it reads."""
    from ..convert.decoders import DECODERS

    defaults, able = contents["defaults"], contents["decoders"]
    # What a model was not trained for is not offered: a loop that its file does not name, or, where
    # keys and values are not causal, any other than the file's own.
    named = defaults["decoders"]
    causal = defaults["prompt_attention"] == "causal"
    others = [d for d in able if d not in named and causal and not DECODERS[d].named]
    return {
        name: {option: value for option, value in able[name].items() if value is not None}
        for name in [*(d for d in named if d in able), *others]
    }


def _adapter(contents: dict[str, Any]) -> dict[str, Any]:
    """What a draft adapter changes, and for which model."""
    metadata, tensors = contents["metadata"], contents["tensors"]
    shapes = {name: shape for name, _, shape, _ in tensors}
    firsts = [name.removesuffix(".weight.lora_a") for name in shapes if name.endswith(".lora_a")]
    return {
        "matrices": sorted({name.rpartition(".")[2] for name in firsts}),
        "layers": len({name.rpartition(".")[0] for name in firsts}),
        "ranks": sorted({shapes[f"{name}.weight.lora_a"][0] for name in firsts}),
        "alpha": metadata.get("adapter.lora.alpha"),
        "mask_embedding": "sbd.draft.mask_embedding" in shapes,
    }


def _tokenizer(metadata: dict[str, Any]) -> str | None:
    if "tokenizer.huggingface.json" in metadata:
        return "tokenizer.json"
    kind = metadata.get("tokenizer.ggml.model")
    return None if kind is None else f"{kind} (from tokenizer.ggml.*)"


def _print_summary(summary: dict[str, Any]) -> None:
    from rich.text import Text

    from .console import Console, Table, print_table

    console = Console()
    lines = [(one_line(label), one_line(value)) for label, value in _lines(summary)]
    width = max(len(label) for label, _ in lines) + 2
    for label, value in lines:
        console.print(Text(label.ljust(width), "bold") + value, soft_wrap=True)
    if "tensors" in summary:
        listing = Table("tensor", "type", "shape", "bytes", words=("tensor", "type", "shape"))
        for tensor in summary["tensors"]:
            shape = " x ".join(str(size) for size in tensor["shape"])
            listing.add_row(
                Text(one_line(tensor["name"])), tensor["type"], shape, f"{tensor['bytes']:,}"
            )
        console.print()
        print_table(listing)


def _lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each line for people."""
    types = ", ".join(f"{dtype} {shown(size)}" for dtype, size in summary["bytes_by_type"].items())
    title = summary["file"] + (f" ({summary['name']})" if summary["name"] else "")
    lines = [
        ("file", f"{title}, {shown(summary['file_bytes'])}"),
        ("parameters", f"{summary['parameters'] / 1e6:.1f} M in {summary['n_tensors']} tensors"),
        ("types", types or "none"),
        ("architecture", str(summary["architecture"])),
    ]
    config = summary["model_config"]
    if config:
        lines += [
            ("layers", str(config["num_hidden_layers"])),
            ("hidden / ffn", f"{config['hidden_size']} / {config['intermediate_size']}"),
            (
                "heads",
                f"{config['num_attention_heads']} query, {config['num_key_value_heads']} "
                f"key-value, {config['head_dim']} wide",
            ),
            ("vocabulary", str(config["vocab_size"])),
            ("context", _context(config)),
            ("mask token", str(config["mask_token_id"])),
            ("end tokens", ", ".join(str(token) for token in config["eos_token_ids"]) or "none"),
        ]
    adapter = summary["adapter"]
    if adapter:
        lines += [
            ("an adapter for", f"a model that drafts with it: MODEL --draft {summary['file']}"),
            ("changes", f"{', '.join(adapter['matrices'])} of {adapter['layers']} layers"),
            ("rank / alpha", f"{_value(adapter['ranks'])} / {_value(adapter['alpha'])}"),
            (
                "mask embedding",
                "yes" if adapter["mask_embedding"] else "no: the model's mask token",
            ),
        ]
    else:
        lines += [
            ("tokenizer", summary["tokenizer"] or "none: prompts are token ids"),
            ("chat template", "yes" if summary["chat_template"] else "no"),
        ]
    if summary["fingerprint"]:
        lines.append(("fingerprint", summary["fingerprint"]))
    lines += [(key, _value(value)) for key, value in summary["sbd"].items()]
    for i, (decoder, values) in enumerate((summary["decoders"] or {}).items()):
        listed = ", ".join(f"{option} {_value(value)}" for option, value in values.items())
        lines.append(("also" if i else "decoder", decoder + (f" ({listed})" if listed else "")))
    if summary["problem"]:
        lines.append(("cannot run", summary["problem"]))
    return lines


def _context(config: dict[str, Any]) -> str:
    limit, window = config["max_position_embeddings"], config["sliding_window"]
    if 0 < window < limit:
        return (
            f"{window} tokens: the sliding window, beyond which this engine does not compute, of "
            f"the model's {limit}"
        )
    return f"{limit} tokens"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_value, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
