"""What a source's rows attended to at each of their steps, where somebody wants it told.

Knows the rows of one source; does not know tokens, scores or where attention comes from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# There is room for so many tokens at first; it doubles when a target outgrows it.
_FIRST_TOKENS = 32


class AttentionHistory:
    """Kept like tokens: a hypothesis that goes on keeps its row, and a fork copies."""

    def __init__(self, width: int, source_tokens: int) -> None:
        """Of a source of so many tokens, in ``width`` rows."""
        # [W, room, source tokens]
        self._weights: NDArray[np.float32] = np.zeros((width, _FIRST_TOKENS, source_tokens), np.float32)

    def record(self, attention: NDArray[np.float32], position: int) -> None:
        """What a step attended to, before anything is made of it.

        Args:
            attention: [W, capacity]; 0 beyond the source.
            position: of the token that the step is to lead to.
        """
        if position == self._weights.shape[1]:
            self._weights = np.concatenate((self._weights, np.zeros_like(self._weights)), axis=1)
        self._weights[:, position] = attention[:, : self._weights.shape[2]]

    def fork(self, from_beam: int, to_beam: int, start: int, stop: int) -> None:
        """A hypothesis goes on in a second row, which is dead; start and stop as in `Fork`.

        What leads to a token follows from the positions before it, so that rows that agree on ``start`` of them do on the
        attention of as many tokens.
        """
        self._weights[to_beam, start:stop] = self._weights[from_beam, start:stop]

    def coverage(self, beam: int, stop: int) -> float:
        """What the first ``stop`` tokens of a row lack in attention to their source: at most 0.

        The sum of log(min(a, 1)) over source tokens, a being the attention that one got from all these tokens together; one that
        got none at all does not count. Wu et al. 2016 (GNMT), equation 14, as CTranslate2 has it.
        """
        got = self._weights[beam, :stop].sum(axis=0, dtype=np.float64)
        return float(np.log(np.minimum(got[got > 0], 1.0)).sum())

    def of(self, beam: int, start: int, stop: int) -> NDArray[np.float32]:
        """[stop - start, source tokens] for these tokens of a row, a copy."""
        return self._weights[beam, start:stop].copy()
