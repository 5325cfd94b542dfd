"""The process of one peer: loads it, then answers requests, one JSON object a line.

`python -m peers.worker MODULE OPTIONS`; MODULE has `load(options) -> Peer`. The first line out says
whether that worked, every further one answers one line of standard input.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_PR_SET_PDEATHSIG = 1


class Missing(Exception):
    """The peer cannot take part; the message says what to install."""


class Peer(Protocol):
    """A loaded engine. `setting` is one of the peer's own ways to run, {} its only one."""

    about: str  # name and version

    def time(
        self, rows: int, context: int, repeats: int, setting: dict[str, Any]
    ) -> Sequence[float]:
        """Milliseconds of each of `repeats` forwards of `rows` behind `context` positions of KV
        cache, after one that is not counted."""
        ...

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], setting: dict[str, Any]
    ) -> NDArray[np.float32]:
        """[len(tokens), vocab_size], causal, with `prompt` in the KV cache."""
        ...


def answer(peer: Any, request: dict[str, Any]) -> Any:
    """Calls the method that the request names. Arrays travel in a file."""
    arguments = dict(request)
    method = arguments.pop("call")
    to = arguments.pop("to", None)
    result = getattr(peer, method)(**arguments)
    if to is not None:
        np.save(to, result)
        return None
    return result


def main(module: str, options: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with its parent, even stopped
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print do not garble the answers

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        peer = importlib.import_module(module).load(json.loads(options))
    except (Missing, ImportError) as error:
        say({"missing": str(error)})
        return
    say({"about": peer.about})
    for line in sys.stdin:
        try:
            say({"result": answer(peer, json.loads(line))})
        except Exception as error:  # the parent names the peer and goes on without it
            say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(*sys.argv[1:])
