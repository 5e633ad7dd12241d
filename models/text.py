"""Text out of a stream of token ids, piece by piece, each piece final.

Three things are held back until they are decided: bytes that are not a whole UTF-8 character yet,
a run of byte-fallback tokens (decoders judge such a run as a whole), and text that may be the
beginning of a stop string. So the pieces join to the decoded text, cut before the first stop.
"""

from collections.abc import Sequence
from typing import Protocol

from petalnode.errors import UsageError

WINDOW_TOKENS = 48
"""Ids that are decoded again with each new one, at most; more would make long texts quadratic."""
OVERLAP_TOKENS = 8
MAX_STOPS = 64
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What is needed of a tokenizer here."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    def is_silent(self, token: int) -> bool:
        """Return whether an id has no text at all, wherever it is."""

    def is_byte(self, token: int) -> bool:
        """Return whether an id stands for one raw byte."""


class TextStream:
    """The text of one generated row. `stopped`: a stop string was seen, the text ends before it."""

    def __init__(self, tokenizer: Decoder, stops: Sequence[str] = ()) -> None:
        if len(stops) > MAX_STOPS or "" in stops:
            raise UsageError(f"Give at most {MAX_STOPS} stop strings, none of them empty.")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._window: list[int] = []
        self._decided = 0  # characters of the window's text that went to `_held` or further
        self._held = ""  # decided text that may begin a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """Take the next token id; return the text that became final, often "" or one word."""
        if self.stopped or self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._tokenizer.decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        piece = self._release(text)
        self._shorten()
        return piece

    def finish(self) -> str:
        """Return the rest of the text: the stream has ended."""
        if self.stopped:
            return ""
        piece = self._release(self._tokenizer.decode(self._window))
        rest, self._held = self._held, ""
        self._window, self._decided = [], 0
        return piece if self.stopped else piece + rest

    def _release(self, text: str) -> str:
        """Take the window's text; return what of it no stop string can claim."""
        self._held += text[self._decided :]
        self._decided = max(self._decided, len(text))
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            # The stop that is complete first: how the text was cut in pieces must not matter.
            self.stopped = True
            piece, self._held = self._held[: min(found)[1]], ""
            return piece
        keep = _stop_overlap(self._held, self._stops)
        cut = len(self._held) - keep
        piece, self._held = self._held[:cut], self._held[cut:]
        return piece

    def _shorten(self) -> None:
        """Drop old, decided ids from the window.

        What stays must have text of its own: decoders drop the space before the first word, and
        that must not be a word that is still to come.
        """
        if len(self._window) < WINDOW_TOKENS:
            return
        rest = self._window[-OVERLAP_TOKENS:]
        kept = self._tokenizer.decode(rest)
        if kept:
            self._window, self._decided = rest, len(kept)


def _stop_overlap(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that a stop string begins with."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        tail = text[-length:]
        if any(stop.startswith(tail) for stop in stops):
            return length
    return 0
