"""The nouns of decoding: options, a sequence to decode, what came of it.

Knows ids and times; does not know text, arrays, caches, graphs or rpc.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field


class FinishReason(enum.Enum):
    """Why a hypothesis ended."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions:
    """How one sequence is decoded; already checked against the limits."""

    # Hypotheses kept alive at each step; 1 decodes greedily.
    beam_size: int = 1
    # Hypotheses returned, best first; at most beam_size.
    num_hypotheses: int = 1
    # score = log-probability / length^length_penalty, length counting the end-of-sentence token.
    length_penalty: float = 1.0
    # The end-of-sentence token is not taken before so many tokens (itself not counted).
    min_target_tokens: int = 0
    # A hypothesis ends at so many tokens (the end-of-sentence token counted).
    max_target_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """One finished translation as ids."""

    # Without the start token and without the end-of-sentence token.
    target_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason
    # Tokens decoded, the end-of-sentence token included.
    target_tokens: int


@dataclass(slots=True, kw_only=True)
class SequenceTimings:
    """Where a sequence's time went; seconds of one monotonic clock."""

    queue_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    steps: int = 0
    # Mean number of rows that stepped together with it.
    mean_rows_per_step: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a sequence ended: hypotheses (best first), or the error that ended it."""

    hypotheses: tuple[Hypothesis, ...] = ()
    timings: SequenceTimings = field(default_factory=SequenceTimings)
    error: Exception | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One source to decode, from its arrival to its outcome. The scheduler and one worker pass it on; nobody copies it."""

    source_ids: tuple[int, ...]
    options: DecodingOptions
    # Monotonic seconds.
    arrived_at_s: float
    expires_at_s: float
    # Called once, on a worker's thread, with what came of it.
    on_outcome: Callable[[Outcome], None]
    # Called on a worker's thread after each step with the new token, when somebody is streaming (greedy only).
    # Must not raise: it runs in the middle of a step that others are in.
    on_token: Callable[[int], None] | None = None
    # Set by the caller's side at any time; the worker frees its rows at the next step.
    cancelled: bool = False
    timings: SequenceTimings = field(default_factory=SequenceTimings)

    @property
    def num_rows(self) -> int:
        """Cache rows it takes while it runs: one for each beam."""
        return self.options.beam_size
