"""TextStream: text as its tokens come, a character as soon as its last byte is there."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a tokenizer decodes half a character to
# Tokens that are decoded again with a new one: enough for a character, and for how tokenizers join words.
OVERLAP = 8


class TextStream:
    """Prints one row's tokens.

    Args:
        tokenizer: decodes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._printed = ""  # of what the kept tokens decode to

    def put(self, token: int) -> None:
        """One more token."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        if not text.endswith(INCOMPLETE):
            self._print(text)

    def end(self) -> None:
        """No more tokens: print what is left, whole or not."""
        self._print(self._decode(self._tokens))

    def _print(self, text: str) -> None:
        print(text[len(self._printed) :], end="", flush=True)
        self._tokens = self._tokens[-OVERLAP:]
        self._printed = self._decode(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
