"""The texts of an answer, as chat and completions write them: piece by piece, or whole.

Both are made of the same pieces, so that an answer is the same streamed and not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..completion import Chunk, Scores, TokenLogprob
from .calls import CallSplitter
from .checks import Json
from .thinking import ThinkingSplitter

Piece = Callable[[int], str]  # the text of one token
_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class Choice(Protocol):
    """One text. `begin` and `add` give what a stream tells of it, if anything, `whole` all."""

    index: int

    def begin(self, scores: Scores | None) -> Json | None: ...

    def add(self, chunk: Chunk) -> Json | None: ...

    def end_unasked(self) -> Json:
        """Where nothing was to be generated."""
        ...

    def whole(self) -> Json: ...


class ChatChoice:
    """thinking: tells what the model thinks from what it answers, where it has tags for that.
    calls: tells the calls of functions from the answer, where there may be some."""

    def __init__(
        self,
        index: int,
        piece: Piece,
        thinking: ThinkingSplitter | None,
        calls: CallSplitter | None,
    ) -> None:
        self.index, self._piece, self._thinking, self._calls = index, piece, thinking, calls
        self._said: dict[str, str] = {"content": ""}
        self._called: list[Json] = []
        self._logprobs: list[Json] | None = None
        self._told_logprobs = 0
        self._role: Json = {"role": "assistant"}  # comes with what is first told
        self._finish: str | None = None

    def begin(self, scores: Scores | None) -> None:
        pass

    def add(self, chunk: Chunk) -> Json | None:
        self._finish = chunk.finish_reason
        delta = self._delta(chunk)
        for call in delta.get("tool_calls", ()):
            self._add_call(call)
        for name in delta.keys() - {"tool_calls"}:
            self._said[name] = self._said.get(name, "") + delta[name]
        if self._finish == "stop" and self._calls and self._calls.whole:
            self._finish = "tool_calls"
        if chunk.logprobs is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += [self._scored(each) for each in chunk.logprobs]
        if not delta and not self._finish:
            return None
        told, self._role = {**self._role, **delta}, {}
        if "role" in told and not delta:
            told["content"] = ""
        return {
            "index": self.index,
            "delta": told,
            "logprobs": self._new_logprobs(),
            "finish_reason": self._finish,
        }

    def end_unasked(self) -> Json:
        raise AssertionError("a chat has an answer")

    def whole(self) -> Json:
        message: Json = {"role": "assistant", **self._said}
        if self._called:
            message |= {"content": self._said["content"] or None, "tool_calls": self._called}
        return {
            "index": self.index,
            "message": message,
            "logprobs": None if self._logprobs is None else {"content": self._logprobs},
            "finish_reason": self._finish,
        }

    def _delta(self, chunk: Chunk) -> Json:
        said: Json = {"content": chunk.text}
        last = chunk.finish_reason is not None
        if self._thinking is not None:
            thought, answer = self._thinking.feed(chunk.text, last)
            said = {"reasoning_content": thought, "content": answer}
        if self._calls is not None:
            text, calls = self._calls.feed(said["content"], last)
            said |= {"content": text, "tool_calls": calls}
        return {name: each for name, each in said.items() if each}

    def _add_call(self, call: Json) -> None:
        """What a stream tells of it, to what there is."""
        if call["index"] == len(self._called):
            function = {"name": call["function"]["name"], "arguments": ""}
            self._called.append({"id": call["id"], "type": "function", "function": function})
        self._called[call["index"]]["function"]["arguments"] += call["function"]["arguments"]

    def _new_logprobs(self) -> Json | None:
        """Those of tokens whose text was held back come with the text."""
        if self._logprobs is None:
            return None
        new = self._logprobs[self._told_logprobs :]
        self._told_logprobs = len(self._logprobs)
        return {"content": new}

    def _scored(self, scored: TokenLogprob) -> Json:
        best = [self._one(*each) for each in scored.best]
        return {**self._one(scored.token, scored.logprob), "top_logprobs": best}

    def _one(self, token: int, logprob: float) -> Json:
        text = self._piece(token)
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(logprob, _LEAST_LOGPROB), "bytes": data}


class CompletionChoice:
    """echo: the prompt's text, where the answer begins with it, and its tokens."""

    def __init__(self, index: int, piece: Piece, echo: str) -> None:
        self.index, self._piece = index, piece
        self._echo = echo
        self._text = ""
        self._logprobs: Json | None = None
        self._told_logprobs = 0
        self._offset = 0
        self._finish: str | None = None

    def begin(self, scores: Scores | None) -> Json | None:
        if scores is not None:
            self._add_scores(scores)
        self._text = self._echo
        return self._told(self._echo) if self._echo else None

    def add(self, chunk: Chunk) -> Json | None:
        self._finish = chunk.finish_reason
        self._text += chunk.text
        for token, logprob, best in chunk.logprobs or ():
            self._add_logprob(token, logprob, best)
        if chunk.logprobs is not None:
            self._columns()
        return self._told(chunk.text) if chunk.text or self._finish else None

    def end_unasked(self) -> Json:
        self._finish = "length"
        return self._told("")

    def whole(self) -> Json:
        return {
            "index": self.index,
            "text": self._text,
            "logprobs": self._logprobs,
            "finish_reason": self._finish,
        }

    def _told(self, text: str) -> Json:
        new = None
        if self._logprobs is not None:
            new = {name: column[self._told_logprobs :] for name, column in self._logprobs.items()}
            self._told_logprobs = len(self._logprobs["tokens"])
        return {"index": self.index, "text": text, "logprobs": new, "finish_reason": self._finish}

    def _columns(self) -> Json:
        if self._logprobs is None:
            names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            self._logprobs = {name: [] for name in names}
        return self._logprobs

    def _add_scores(self, scores: Scores) -> None:
        columns = zip(scores.tokens, scores.logprobs, scores.top, strict=True)
        for token, logprob, best in columns:
            self._add_logprob(token, logprob, best)

    def _add_logprob(
        self, token: int, logprob: float | None, best: Sequence[tuple[int, float]]
    ) -> None:
        """OpenAI's older form: of the best a table by text, the token itself always among them."""
        columns = self._columns()
        text = self._piece(token)
        columns["tokens"].append(text)
        columns["text_offset"].append(self._offset)
        self._offset += len(text)
        if logprob is None:  # nothing stands before it
            columns["token_logprobs"].append(None)
            columns["top_logprobs"].append(None)
            return
        table: dict[str, Any] = {text: max(logprob, _LEAST_LOGPROB)}
        for other, its in best:
            table.setdefault(self._piece(other), max(its, _LEAST_LOGPROB))
        columns["token_logprobs"].append(table[text])
        columns["top_logprobs"].append(table)
