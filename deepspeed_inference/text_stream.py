"""TextStream: text as its tokens come, a character as soon as its last byte is there."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a tokenizer decodes half a character to
# Tokens that are decoded again with a new one: enough for a character, and for how tokenizers join words.
OVERLAP = 8


class TextStream:
    """Prints one row's tokens, up to the first stop text. What may be the beginning of one waits until it is clear.

    Args:
        tokenizer: decodes them.
        stop: texts that end the row; none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._taken = ""  # of what the kept tokens decode to
        self._held_back = ""
        self._has_stopped = False

    def put(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith(INCOMPLETE):
            self._take(text)

    def end(self) -> None:
        """No more tokens: print what is left, whole or not."""
        self._take(self._decode(self._tokens))
        print(self._held_back, end="", flush=True)
        self._held_back = ""

    def _take(self, text: str) -> None:
        self._held_back += text[len(self._taken) :]
        self._tokens = self._tokens[-OVERLAP:]
        self._taken = self._decode(self._tokens)
        if self._has_stopped:
            self._held_back = ""
            return
        place = first_stop(self._held_back, self._stop)
        self._has_stopped = place is not None
        clear = len(self._held_back) - _may_begin(self._held_back, self._stop) if place is None else place
        print(self._held_back[:clear], end="", flush=True)
        self._held_back = "" if self._has_stopped else self._held_back[clear:]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop texts in a text begins; None where there is none."""
    return min((place for one in stop if (place := text.find(one)) >= 0), default=None)


def _may_begin(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop text."""
    longest = max((len(one) - 1 for one in stop), default=0)
    return next(
        (size for size in range(min(longest, len(text)), 0, -1) if any(one.startswith(text[-size:]) for one in stop)), 0
    )
