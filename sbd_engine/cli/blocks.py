"""`run --show-blocks`: a block of masks filling in, a forward at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.live import Live
from rich.text import Text

from ..completion import Reveal
from ..engine import Engine
from ..streams import Stream
from ..tokenizer import Tokenizer
from .console import Console
from .options import terminal_safe

_MASK = "\u2591"  # light shade


def show(engine: Engine, stream: Stream, block_size: int, delay: float, keep: bool) -> None:
    """Writes final text as it comes, with the block that is being decided behind it, each forward's
    for `delay` seconds. `keep`: each forward's block on a line of its own, and then the text."""
    console = Console()
    view = BlockView(engine.tokenizer, block_size)
    if keep:
        try:
            for number, chunk in enumerate(stream, 1):
                view.reveal(chunk.revealed, len(chunk.tokens))
                line = Text(f"{number:3} ", "dim").append_text(view.render())
                console.print(line, soft_wrap=True)
                time.sleep(delay)
        finally:
            stream.close()
            console.out(terminal_safe(stream.completion.text), highlight=False)
        return
    text = ""
    written = 0  # characters of whole lines that stand on the screen
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            for chunk in stream:
                view.reveal(chunk.revealed, len(chunk.tokens))
                written = _write_lines(console, text, written)
                unfinished = Text(text[written:]).append_text(view.render())
                live.update(_last_lines(unfinished, console), refresh=True)
                text += terminal_safe(chunk.text)
                time.sleep(delay)
        finally:
            stream.close()
            live.update(Text(""), refresh=True)
    console.out(terminal_safe(stream.completion.text)[written:], highlight=False)


def _last_lines(text: Text, console: Console) -> Text:
    """What of it the screen has room for, its end: what is live cannot scroll."""
    lines = text.wrap(console, console.width, overflow="fold")
    return Text("\n").join(lines[-max(1, console.height - 1) :])


def _write_lines(console: Console, text: str, written: int) -> int:
    """Puts whole lines above the live part; returns how much of the text then stands."""
    end = text.rfind("\n") + 1
    if end > written:
        console.out(text[written:end], end="", highlight=False)
        return end
    return written


class BlockView:
    """The cells behind the text that was final before the last forward: what that forward decided
    is highlighted, what others did has settled, masks are shaded."""

    def __init__(self, tokenizer: Tokenizer, block_size: int) -> None:
        self._tokenizer = tokenizer
        self._block_size = block_size
        self._begin = self._committed = 0
        self._decided: dict[int, int] = {}  # position -> token
        self._fresh: set[int] = set()

    def reveal(self, revealed: Sequence[Reveal], committed: int) -> None:
        """What a forward decided, and how many tokens became final."""
        self._fresh = {reveal.position for reveal in revealed}
        self._decided.update((reveal.position, reveal.token) for reveal in revealed)
        self._begin = self._committed
        self._committed += committed

    def render(self) -> Text:
        text = Text()
        last = max(self._decided, default=0)
        end = (last // self._block_size + 1) * self._block_size
        for position in range(self._begin, end):
            token = self._decided.get(position)
            if token is None:
                text.append(_MASK, style="dim")
            else:
                style = "bold black on green" if position in self._fresh else "green"
                text.append(_visible(self._tokenizer.piece(token)), style=style)
        return text


def _visible(piece: str) -> str:
    return terminal_safe(piece.replace("\n", "\u21b5").replace("\t", "\u2192")) or "\u00b7"
