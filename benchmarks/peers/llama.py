"""llama.cpp, through the C interface that llama-cpp-python carries."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as c
from numpy.typing import NDArray

_MAX_ROWS = 512  # per batch; also its default physical batch


# Where its log goes. Named here because the library calls it for as long as it lives.
_SILENT = c.llama_log_callback(lambda *_: None)


class Context:
    """One KV cache: positions [0, filled) hold what `fill` put there."""

    def __init__(self, model: Any, flash_attention: bool, threads: int, n_ctx: int) -> None:
        params = c.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = _MAX_ROWS
        params.n_outputs_max = params.n_outputs_max_per_seq = _MAX_ROWS
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attention else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = c.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._batch = c.llama_batch_init(_MAX_ROWS, 0, 1)
        self._vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        self._filled = 0

    def decode(self, tokens: Sequence[int], all_logits: bool) -> NDArray[np.float32]:
        """Logits of all rows, or of the last; the KV cache grows."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self._filled + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = all_logits or i == len(tokens) - 1
        status = c.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        c.llama_synchronize(self._context)
        self._filled += len(tokens)
        rows = len(tokens) if all_logits else 1
        logits = c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (rows, self._vocab_size))

    def truncate(self, length: int) -> None:
        c.llama_memory_seq_rm(c.llama_get_memory(self._context), 0, length, -1)
        self._filled = length

    def fill(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Empties the cache, fills it with `tokens`; the last one's logits."""
        self.truncate(0)
        for begin in range(0, len(tokens), _MAX_ROWS):
            logits = self.decode(tokens[begin : begin + _MAX_ROWS], False)
        return logits

    @property
    def filled(self) -> int:
        return self._filled


def about(plain: bool) -> str:
    out = f"llama-cpp-python {llama_cpp.__version__}"
    return out + (", its weights not laid out anew" if plain else "")


def silent_model(path: str, plain: bool) -> Any:
    """plain: weights as the file has them, not laid out anew, for AMX or otherwise."""
    c.llama_log_set(_SILENT, None)
    c.llama_backend_init()
    params = c.llama_model_default_params()
    params.use_extra_bufts = not plain
    model = c.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    return model


class Llama:
    def __init__(self, path: str, threads: int, n_ctx: int, plain: bool = False) -> None:
        self._model = silent_model(path, plain)
        self._contexts = {
            flash: Context(self._model, flash, threads, n_ctx) for flash in (True, False)
        }
        self.about = about(plain)

    def time(
        self, rows: int, context: int, repeats: int, setting: dict[str, Any]
    ) -> Sequence[float]:
        cache = self._contexts[setting["flash_attention"]]
        tokens = list(range(100, 100 + rows))
        if cache.filled != context:
            cache.fill(list(range(100, 100 + context)))
        milliseconds = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            cache.decode(tokens, True)
            milliseconds.append(1e3 * (time.perf_counter() - start))
            cache.truncate(context)
        return milliseconds[1:]

    def logits(
        self, prompt: Sequence[int], tokens: Sequence[int], setting: dict[str, Any]
    ) -> NDArray[np.float32]:
        cache = self._contexts[setting["flash_attention"]]
        cache.fill(prompt)
        return cache.decode(tokens, True)

    def generate(
        self, prompt: Sequence[int], max_tokens: int, setting: dict[str, Any]
    ) -> dict[str, Any]:
        """Greedy, token by token: when each was known, in seconds from the first one."""
        cache = self._contexts[setting["flash_attention"]]
        tokens = [int(cache.fill(prompt).argmax())]
        ends = [time.perf_counter()]
        while len(tokens) < max_tokens:
            tokens.append(int(cache.decode(tokens[-1:], True).argmax()))
            ends.append(time.perf_counter())
        return {"seconds": [end - ends[0] for end in ends], "tokens": tokens}


def load(options: dict[str, Any]) -> Llama:
    return Llama(**options)
