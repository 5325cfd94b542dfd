"""The instruction sets that a CPU of this machine's kind may have."""

from __future__ import annotations

import platform

ISAS = (
    ("scalar", "neon")
    if platform.machine() == "aarch64"
    else ("scalar", "avx2", "avx2_vnni", "avx512", "avx512_bf16")
)
