"""From tokens to text as it grows: no character is split, and a stop string ends the text where it begins.

Knows tokenizers and ids; nothing of models, rows or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["OutputText", "TextStream", "split_tokens"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to
_CONTEXT = 5  # tokens
_MOST_UNFINISHED = 3  # of them may still become one character: it has at most four bytes


class TextStream:
    """The text that each token adds; the pieces and `flush` joined are the text of all tokens.

    Bytes of an unfinished character are held back until the token that completes it.

    Args:
        tokenizer: a Hugging Face tokenizer.
        skip_special_tokens: leave special tokens out of the text.
        context: tokens before the first, whose text is known: some tokenizers drop a space that nothing precedes.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        # Decoding starts a few tokens before the text not yet given out, so that spaces come out right.
        self._window = list(context[-_CONTEXT:])
        self._known = len(self._window)  # leading tokens of the window whose text is out, whole
        self._text = self._decode(self._window)
        self._given = len(self._text.rstrip(UNFINISHED))  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """Take a token; returns the text that is final by it."""
        self._window.append(token)
        self._text = self._decode(self._window)
        stable = self._text.rstrip(UNFINISHED)
        stable = self._text[: max(len(stable), len(self._text) - _MOST_UNFINISHED)]
        piece = stable[self._given :]
        self._given = max(self._given, len(stable))
        if len(stable) == len(self._text):
            self._window, self._known = self._window[self._known :], len(self._window) - self._known
            self._given = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """What is still held back: the beginning of a character that never came to its end."""
        rest = self._text[self._given :] if len(self._window) > self._known else ""
        self._window, self._known, self._given, self._text = [], 0, 0, ""
        return rest

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=self._skips, clean_up_tokenization_spaces=False)
        return text


def split_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; the pieces joined are the text of `ids` without special tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: token ids of one row, complete: what is unfinished at their end comes with the last.
    """
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    if pieces:
        pieces[-1] += stream.flush()
    return pieces


class OutputText:
    """The visible text of one output, cut where a stop string begins.

    Text that may be the beginning of a stop string is held back until it is known not to be. Of an end token no text is
    shown.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stop: strings that end the text; the one that begins first counts.
        end_token_ids: tokens that end the text.
        min_tokens: the text of so many first tokens takes part in no stop string.
        shows_stop: whether what ended the text is shown too.
        skip_special_tokens, context: as in `TextStream`.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str] = (),
        end_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        shows_stop: bool = False,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> None:
        self._stream = TextStream(tokenizer, skip_special_tokens, context)
        self._stop, self._ends, self._min_tokens, self._shows_stop = stop, end_token_ids, min_tokens, shows_stop
        self._count = 0
        self._held = ""
        self.stopped_by: str | int | None = None  # the stop string, or the end token

    def push(self, token: int) -> str:
        """Take a token; returns the text to show by now. After the end nothing more is taken."""
        if self.stopped_by is not None:
            return ""
        self._count += 1
        if token in self._ends:
            self.stopped_by = token
            if not self._shows_stop:
                return ""
        self._held += self._stream.push(token)
        return self._release()

    def _release(self) -> str:
        if self._count <= self._min_tokens or not self._stop:
            shown, self._held = self._held, ""
            return shown
        found = [(at, -len(stop), stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found and self.stopped_by is None:
            at, _, self.stopped_by = min(found)
            shown = self._held[: at + (len(self.stopped_by) if self._shows_stop else 0)]
            self._held = ""
            return shown
        kept = max(map(self._beginning, self._stop))
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown

    def _beginning(self, stop: str) -> int:
        """Length of the longest end of the held text that `stop` begins with."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)

    def finish(self) -> str:
        """What was held back, once no more tokens come; nothing where a stop string ended the text."""
        if isinstance(self.stopped_by, str):
            return ""
        rest, self._held = self._held + self._stream.flush(), ""
        return rest
