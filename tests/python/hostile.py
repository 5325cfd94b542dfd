"""Small files that ask for much, and what a process takes for them."""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

Shapes = Mapping[str, Sequence[int]]


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<Iq", 11, value)


def llama_keys(**changes: int) -> dict[str, Any]:
    sizes = dict(block_count=1, context_length=1024, embedding_length=2, feed_forward_length=2)
    sizes |= {"attention.head_count": 1, "vocab_size": 8} | changes
    return {
        "general.architecture": "llama",
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **{f"llama.{key}": value for key, value in sizes.items()},
    }


def llama_shapes(vocab: int = 8, hidden: int = 2, ffn: int = 2, layers: int = 1) -> Shapes:
    """Of a model of one head."""
    shapes: dict[str, Sequence[int]] = {
        "token_embd.weight": (vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    for i in range(layers):
        names = {f"attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
        names |= {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        names |= {"ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in names.items()}
    return shapes


def write_sparse(path: Path, keys: Mapping[str, Any], shapes: Shapes) -> Path:
    """A GGUF file of F32 tensors that are all holes: zeros, and no bytes on the disk."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(shapes), len(keys))]
    parts += [_text(key) + _value(value) for key, value in keys.items()]
    end = 0
    for name, shape in shapes.items():
        sizes = b"".join(struct.pack("<Q", size) for size in reversed(shape))
        parts.append(
            _text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", 0, end)
        )
        end += -(-4 * prod(shape) // 32) * 32
    head = b"".join(parts)
    with path.open("wb") as file:
        file.write(head.ljust(-(-len(head) // 32) * 32, b"\0"))
        file.truncate(file.tell() + end)
    return path


class Taken(NamedTuple):
    code: int
    output: str
    seconds: float
    mib: int  # at most at any time


def taken(*command: object, stdin: bytes = b"", most_seconds: float = 30) -> Taken:
    """Runs a command; output: both streams; seconds: of a processor."""
    began, used = time.perf_counter(), _used_by_children()
    mib = 0
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as given:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(
            [*map(str, command)],
            stdin=given,
            stdout=output,
            stderr=output,
            cwd=tempfile.gettempdir(),
        )
        while process.poll() is None:
            mib = max(mib, _peak_mib(process.pid))
            if time.perf_counter() - began > most_seconds:
                process.kill()
            time.sleep(0.003)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Taken(process.returncode, text, _used_by_children() - used, mib)


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_mib(pid: int) -> int:
    """Of the program alone: what the system counts of a child begins with its parent's."""
    with suppress(OSError), open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    return 0


def python(code: str, **limits: Any) -> Taken:
    return taken(sys.executable, "-c", code, **limits)
