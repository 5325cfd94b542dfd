"""llama.cpp answering prompts greedily: several in one batch, or one whose drafts are looked up in
the text so far, as llama-cpp-python does that."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp import llama_cpp as c
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from .llama import about, silent_model

_MAX_ROWS = 512
_DRAFTED = 4  # tokens of a looked-up draft at most; llama-cpp-python recommends 2 for CPUs, 10 else


class Answers:
    """`n_ctx` positions for each of `sequences`. plain: weights as the file has them."""

    def __init__(
        self, path: str, threads: int, n_ctx: int, sequences: int, plain: bool = False
    ) -> None:
        self._model = silent_model(path, plain)
        params = c.llama_context_default_params()
        params.n_ctx = n_ctx * sequences
        params.n_seq_max = sequences
        params.n_batch = params.n_ubatch = _MAX_ROWS
        params.n_outputs_max = params.n_outputs_max_per_seq = _MAX_ROWS
        params.n_threads = params.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp made no context")
        self._batch = c.llama_batch_init(_MAX_ROWS, 0, 1)
        self._vocab = c.llama_model_get_vocab(self._model)
        self._vocab_size = c.llama_vocab_n_tokens(self._vocab)
        self._memory = c.llama_get_memory(self._context)
        self.about = about(plain)

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, lookup: bool = False
    ) -> dict[str, Any]:
        """Tokens of each answer, its end included; the forwards behind the prompts; all seconds."""
        started = time.perf_counter()
        c.llama_memory_clear(self._memory, True)
        if lookup:
            (prompt,) = prompts
            tokens, forwards = self._looked_up(prompt, max_tokens)
            texts = [tokens]
        else:
            texts, forwards = self._together(prompts, max_tokens)
        return {"tokens": texts, "forwards": forwards, "seconds": time.perf_counter() - started}

    def _together(
        self, prompts: Sequence[Sequence[int]], max_tokens: int
    ) -> tuple[list[list[int]], int]:
        texts = [[self._prefill(prompt, i)] for i, prompt in enumerate(prompts)]
        forwards = 0
        while True:
            live = [
                i
                for i, text in enumerate(texts)
                if len(text) < max_tokens and not self._ends(text[-1])
            ]
            if not live:
                return texts, forwards
            rows = [(texts[i][-1], len(prompts[i]) + len(texts[i]) - 1, i) for i in live]
            for i, token in zip(live, self._decode(rows, range(len(rows))), strict=True):
                texts[i].append(token)
            forwards += 1

    def _looked_up(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], int]:
        look_up = LlamaPromptLookupDecoding(max_ngram_size=2, num_pred_tokens=_DRAFTED)
        tokens, forwards = [self._prefill(prompt, 0)], 0
        while len(tokens) < max_tokens and not self._ends(tokens[-1]):
            text = np.array([*prompt, *tokens], dtype=np.intc)
            draft = [int(token) for token in look_up(text)][: max_tokens - len(tokens) - 1]
            begin = len(text) - 1
            rows = [(token, begin + i, 0) for i, token in enumerate([tokens[-1], *draft])]
            decided = self._decode(rows, range(len(rows)))
            forwards += 1
            kept = 0
            while kept < len(draft) and draft[kept] == decided[kept]:
                kept += 1
            c.llama_memory_seq_rm(self._memory, 0, begin + kept + 1, -1)
            for token in decided[: kept + 1]:
                tokens.append(token)
                if self._ends(token):
                    break
        return tokens, forwards

    def _prefill(self, prompt: Sequence[int], sequence: int) -> int:
        for begin in range(0, len(prompt), _MAX_ROWS):
            part = prompt[begin : begin + _MAX_ROWS]
            rows = [(token, begin + i, sequence) for i, token in enumerate(part)]
            (last,) = self._decode(rows, [len(rows) - 1])
        return last

    def _ends(self, token: int) -> bool:
        return bool(c.llama_vocab_is_eog(self._vocab, token))

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> list[int]:
        """The best token behind each of the wanted rows (token, position, sequence)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        outputs = set(wanted)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in outputs
        status = c.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = c.llama_get_logits(self._context)
        return [
            int(row.argmax())
            for row in np.ctypeslib.as_array(logits, (len(outputs), self._vocab_size))
        ]


def load(options: dict[str, Any]) -> Answers:
    return Answers(**options)
