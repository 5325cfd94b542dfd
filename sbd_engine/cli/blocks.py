"""`run --show-blocks`: a block of masks filling in, a forward at a time."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..engine import Engine
from ..streams import Stream
from ..tokenizer import Tokenizer
from .options import terminal_safe

_MASK = "\u2591"  # light shade


def show(engine: Engine, stream: Stream, block_size: int) -> None:
    """Writes final text as it comes, with the block that is being decided behind it."""
    console = Console(highlight=False)
    view = BlockView(engine.tokenizer, block_size)
    text = ""
    written = 0  # characters of whole lines that stand on the screen
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            for chunk in stream:
                view.reveal(chunk.revealed, len(chunk.tokens))
                written = _write_lines(live.console, text, written)
                live.update(Text(text[written:]).append_text(view.render()), refresh=True)
                text += terminal_safe(chunk.text)
        finally:
            stream.close()
            live.update(Text(""), refresh=True)
    console.out(terminal_safe(stream.completion.text)[written:], highlight=False)


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

    def reveal(self, revealed: list[tuple[int, int]], committed: int) -> None:
        """What a forward decided, and how many tokens became final."""
        self._decided.update(revealed)
        self._fresh = {position for position, _ in revealed}
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
