"""Where a text ends: before the first of some strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence


class StopStrings:
    """Cuts a growing text before the first stop string to end in it, even one that spans several
    pieces. One pass, however many strings there are: Aho and Corasick's automaton.

    stops: each a string, or its symbols: characters, and special tokens as one symbol each.
    spaced: decoding puts a space before each word, so that one behind a special token is there
    whether or not a stop string has it.
    """

    def __init__(self, stops: Iterable[Sequence[str]], spaced: bool = False) -> None:
        self.stopped = False
        self._spaced = spaced
        self._held: list[str] = []  # by symbol, what may begin a stop string; "" for a hidden one
        self._state = 0  # the longest beginning of a stop string that the text ends in
        # By state: what follows, the longest other state that the text ends in as well, how many
        # symbols it is, and how many of them at the end are a stop string.
        self._next: list[dict[str, int]] = [{}]
        self._fallback, self._depth, self._stop_length = [0], [0], [0]
        for stop in stops:
            self._add(stop)
        self._link()

    @property
    def any(self) -> bool:
        return len(self._next) > 1

    def feed(self, piece: str) -> str:
        """The part of the text so far that is now certain to come before any stop string."""
        if not self.any:
            return piece
        if piece.startswith(" ") and self._takes_space():
            self._held[-1], piece = " ", piece[1:]
        for character in piece:
            if self._ends_a_stop(character, shown=character):
                return self._let_out(self._stop_length[self._state])
        return self._let_out(self._depth[self._state])

    def feed_whole(self, token: str, shown: str) -> str:
        """The same for a special token, of which the text has what is `shown`."""
        ends = self._ends_a_stop(token, shown)
        return self._let_out((self._stop_length if ends else self._depth)[self._state])

    def flush(self) -> str:
        """What was held back, now that no more text follows."""
        self._state = 0
        return self._let_out(0)

    def _let_out(self, kept: int) -> str:
        certain = len(self._held) - kept
        text = "".join(self._held[:certain])
        del self._held[:certain]
        return text

    def _ends_a_stop(self, symbol: str, shown: str) -> bool:
        self._held.append(shown)
        state = self._state
        while state and symbol not in self._next[state]:
            state = self._fallback[state]
        self._state = self._next[state].get(symbol, 0)
        self.stopped = self._stop_length[self._state] > 0
        return self.stopped

    def _takes_space(self) -> bool:
        """Whether a stop string goes on behind a special token, and not with a space."""
        begun = self._spaced and self._state
        return bool(begun and not self._held[-1] and " " not in self._next[self._state])

    def _add(self, stop: Sequence[str]) -> None:
        state = 0
        for symbol in stop:
            after = self._next[state].get(symbol)
            if after is None:
                after = self._next[state][symbol] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._stop_length.append(0)
            state = after
        self._stop_length[state] = self._depth[state]

    def _link(self) -> None:
        """Fallbacks, shortest states first: each needs those of shorter ones."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            inherited = self._stop_length[self._fallback[state]]
            self._stop_length[state] = self._stop_length[state] or inherited
            for symbol, after in self._next[state].items():
                queue.append(after)
                fallback = self._fallback[state]
                while fallback and symbol not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[after] = self._next[fallback].get(symbol, 0)
