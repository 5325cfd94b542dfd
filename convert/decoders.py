"""The names that a model file's `sbd.*` keys may hold, and what stands behind each.

The engine has its own list of what it runs; a name that is only here is refused there.
"""

from __future__ import annotations

from dataclasses import dataclass

RULES = ("entropy_bounded", "factor", "confidence", "top_n")  # of unmasking
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
    named: bool = False  # only for files that name it: a family's own loop, or trained for it


DECODERS = {
    "ntp": Decoder(needs=()),
    "sbd": Decoder(),
    "sbd_lossless": Decoder(),
    "dmtd": Decoder(needs=("dmtd.layers",)),
    "d2f": Decoder(named=True),
    "nemotron": Decoder(named=True),
    "nemotron_spec": Decoder(named=True),
    "sdar": Decoder(named=True),
    "fast_dllm_v2": Decoder(named=True),
    "llada": Decoder(named=True),
    "dream": Decoder(named=True),
}
