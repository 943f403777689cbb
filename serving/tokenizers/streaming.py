"""The text of a target while it is decoded; what makes text certain is each tokenizer's own knowledge."""

from __future__ import annotations

from collections.abc import Iterable

from serving.tokenizers.base import Tokenizer


class StreamingDetokenizer:
    """Text of one target as its tokens arrive; what it has told is never taken back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """For one target; make another for the next."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = 0  # characters

    def push(self, token_ids: Iterable[int]) -> str:
        """Add tokens; the text that is certain now and was not before, perhaps none."""
        self._ids.extend(token_ids)
        # All ids each time: 512 of them take some 20 us, and where pieces may be cut is the tokenizer's secret.
        return self._tell(self._tokenizer.certain_text(self._ids))

    def finish(self) -> str:
        """The rest, when no token follows. All that was told is now exactly ``decode`` of all ids."""
        return self._tell(self._tokenizer.decode(self._ids))

    def _tell(self, text: str) -> str:
        delta = text[self._told :]
        self._told += len(delta)
        return delta
