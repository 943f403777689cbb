"""What rows attended to at each of their steps, of the sources of a lane that want it told.

Knows slots, rows and forks; does not know tokens, scores or where attention comes from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A new source has room for so many tokens; the room doubles when its target outgrows it.
_FIRST_TOKENS = 32


class AttentionHistory:
    """Kept like tokens: a hypothesis that goes on keeps its row, and a fork copies. Costs nothing while nobody wants it."""

    def __init__(self, num_slots: int, width: int) -> None:
        """Of a lane's slots, ``width`` rows each."""
        self.width = width
        # [W, room, source tokens] of each slot; None where nobody wants it.
        self._weights: list[NDArray[np.float32] | None] = [None] * num_slots
        self._num_wanted = 0

    @property
    def is_wanted(self) -> bool:
        """Whether the next step has to tell what rows attend to."""
        return self._num_wanted > 0

    def add(self, slot: int, source_tokens: int) -> None:
        """Start to follow a source of so many tokens, in a slot that is free."""
        self._weights[slot] = np.zeros((self.width, _FIRST_TOKENS, source_tokens), np.float32)
        self._num_wanted += 1

    def record(self, attention: NDArray[np.float32], positions: NDArray[np.int32]) -> None:
        """What a step attended to, before anything is made of it.

        Args:
            attention: [slots in use, W, capacity]; 0 beyond a source.
            positions: [slots in use], of the token that the step is to lead to.
        """
        for slot, weights in enumerate(self._weights[: len(attention)]):
            if weights is None:
                continue
            position = int(positions[slot])
            if position == weights.shape[1]:
                self._weights[slot] = weights = np.concatenate((weights, np.zeros_like(weights)), axis=1)
            weights[:, position] = attention[slot, :, : weights.shape[2]]

    def fork(
        self,
        slots: NDArray[np.intp],
        from_beams: NDArray[np.intp],
        to_beams: NDArray[np.intp],
        starts: NDArray[np.int32],
        stops: NDArray[np.int32],
    ) -> None:
        """Hypotheses go on in a second row, which is dead: arrays [forks], as in `Fork`.

        What leads to a token follows from the positions before it, so that rows that agree on ``starts`` of them do on the
        attention of as many tokens.
        """
        columns = (column.tolist() for column in (slots, from_beams, to_beams, starts, stops))
        for slot, from_beam, to_beam, start, stop in zip(*columns, strict=True):
            weights = self._weights[slot]
            if weights is not None:
                weights[to_beam, start:stop] = weights[from_beam, start:stop]

    def coverage(self, slot: int, beam: int, stop: int) -> float:
        """What the first ``stop`` tokens of a row lack in attention to their source: at most 0.

        The sum of log(min(a, 1)) over source tokens, a being the attention that one got from all these tokens together; one that
        got none at all does not count. Wu et al. 2016 (GNMT), equation 14, as CTranslate2 has it.
        """
        weights = self._weights[slot]
        assert weights is not None
        got = weights[beam, :stop].sum(axis=0, dtype=np.float64)
        return float(np.log(np.minimum(got[got > 0], 1.0)).sum())

    def of(self, slot: int, beam: int, start: int, stop: int) -> NDArray[np.float32] | None:
        """[stop - start, source tokens] for these tokens of a row, a copy; None where nobody wants it."""
        weights = self._weights[slot]
        return None if weights is None else weights[beam, start:stop].copy()

    def leave(self, slot: int) -> None:
        """A source is over; its slot is free."""
        self._num_wanted -= self._weights[slot] is not None
        self._weights[slot] = None

    def move(self, from_slot: int, to_slot: int) -> None:
        """Move a source into a slot that is free; its own is free then."""
        self._weights[to_slot], self._weights[from_slot] = self._weights[from_slot], None
