"""The names that a model file's `sbd.*` keys may hold, and what stands behind each.

The engine has its own list of what it runs; a name that is only here is refused there.
"""

from __future__ import annotations

from dataclasses import dataclass

# Unmasking rules, and the keys that each reads.
RULES = {
    "entropy_bounded": ("gamma", "proxy"),
    "factor": ("factor",),
    "confidence": ("threshold",),
    "top_n": ("top_n", "proxy"),
}
PROXIES = ("entropy", "confidence", "margin", "position")
SCHEDULES = ("even", "linear")
PROMPT_RULES = ("all_heads", "plain", "train")
D2F_THRESHOLDS = (
    "d2f.block_add_threshold",
    "d2f.decoded_token_threshold",
    "d2f.skip_threshold",
)


@dataclass(frozen=True)
class Decoder:
    needs: tuple[str, ...] = ("mask_token_id",)  # keys without which it cannot run
    reads: tuple[str, ...] = ("block_size", "unmask")  # "unmask": that rule's keys too
    named: bool = False  # only for files that name it: a family's own loop, or trained for it


DECODERS = {
    "ntp": Decoder(needs=(), reads=()),
    "sbd": Decoder(),
    "sbd_lossless": Decoder(),
    "dmtd": Decoder(
        needs=("dmtd.layers",), reads=("dmtd.layers", "dmtd.horizon", "dmtd.prompt_rule")
    ),
    "d2f": Decoder(reads=("block_size", *D2F_THRESHOLDS), named=True),
    "nemotron": Decoder(named=True),
    "nemotron_spec": Decoder(reads=("block_size",), named=True),
    "sdar": Decoder(reads=("block_size", "steps", "unmask"), named=True),
    "fast_dllm_v2": Decoder(reads=("block_size", "sub_block_size", "unmask"), named=True),
    "llada": Decoder(reads=("block_size", "steps", "unmask"), named=True),
    "dream": Decoder(reads=("steps", "schedule", "unmask"), named=True),
}
