"""Stop texts: an answer ends where one of them appears, and is left without it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from deepspeed_inference.text_stream import OVERLAP, first_stop


class StopTexts:
    """Watches the tokens of one answer.

    Args:
        tokenizer: decodes them.
        texts: that end the answer; none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]):
        self._tokenizer, self._texts = tokenizer, tuple(texts)
        self._tokens: list[int] = []
        # A token has at least one byte, and a character at most four: so many tokens hold a stop text, whole.
        self._window = max((len(text.encode()) for text in self._texts), default=0) + OVERLAP

    def put(self, token: int) -> bool:
        """One more token; whether a stop text is there now."""
        self._tokens.append(token)
        if not self._texts:
            return False
        recent = self._decode(self._tokens[-self._window :])
        return first_stop(recent, self._texts) is not None

    def text(self) -> str:
        """Of all tokens, up to the first stop text."""
        text = self._decode(self._tokens)
        return text[: first_stop(text, self._texts)]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
