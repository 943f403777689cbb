"""The nouns of decoding: options, a sequence to decode, what came of it.

Knows ids and times; does not know text, caches, graphs or rpc.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


class FinishReason(enum.Enum):
    """Why a hypothesis ended."""

    EOS = "eos"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Tokens are drawn, not taken for their probability."""

    # Among the so many most probable; 0: among all.
    top_k: int = 0
    # Among the fewest most probable that together have this share, above 0 up to 1.
    top_p: float = 1.0
    # Below 1 the probable ones become more so, above 1 less.
    temperature: float = 1.0
    # The same seed draws the same, whoever else is there.
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternatives:
    """Hypotheses are to differ in the token that comes after the prefix; see ``serving.plan``."""

    # Tokens that are less probable than this are not gone on with, but the first; from 0, which takes any, to 1.
    min_probability: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixBias:
    """A target that a translation is drawn towards as long as it has followed it."""

    tokens: tuple[int, ...]
    # From 0, no pull at all, up to below 1.
    strength: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingOptions:
    """How one sequence is decoded; already checked against the limits."""

    # Hypotheses kept alive at each step; 1 decodes greedily.
    beam_size: int = 1
    # Hypotheses returned, best first; at most beam_size of one sequence (see ``serving.plan`` for more).
    num_hypotheses: int = 1
    # score = (log-probability - word_penalty * length) / length^length_penalty, length counting the end-of-sentence token.
    length_penalty: float = 1.0
    # Taken from the log-probability for each token, the end-of-sentence token included, before it is divided.
    word_penalty: float = 0.0
    # Added to the score for each source token that got less than 1 of the attention, all tokens of the target together: the
    # logarithm of what it got, times this.
    coverage_penalty: float = 0.0
    # The end-of-sentence token is not taken before so many tokens (itself not counted).
    min_target_tokens: int = 0
    # A hypothesis ends at so many tokens (the end-of-sentence token counted).
    max_target_tokens: int = 256
    # Greedy search does without log-probabilities where nobody wants a score.
    return_scores: bool = True
    # Whether each token's part in the score is told.
    return_token_scores: bool = False
    # Whether it is told which source tokens each token attended to.
    return_attention: bool = False
    # What the target starts with, whatever the model thinks of it; it adds nothing to the score, and counts for the length.
    target_prefix: tuple[int, ...] = ()
    # So many tokens of the prefix, from its start, are the model's own (the token of a language) and no part of the answer.
    hidden_prefix_tokens: int = 0
    # Not empty: what comes after the prefix is given as well, up to the end-of-sentence token, its last. Nothing is searched for;
    # what is asked is how probable the model finds each token. Greedy only; rules for single tokens do not hold for them.
    given_target: tuple[int, ...] = ()
    # With beams: whether a source is done when ``patience`` times beam_size hypotheses have ended (as CTranslate2 does), or only
    # when none that runs could still become one of the best (as Hugging Face does).
    early_stopping: bool = False
    patience: float = 1.0
    # With beams: whether a hypothesis that ended leaves its beam empty, so that the search is over with the last of beam_size
    # ends (as Marian does), or so many go on running.
    shrinking_beam: bool = False
    # With early stopping, whether any continuation of a prefix may end right after it, or the best alone, as CTranslate2 has it
    # after a prefix that was asked for, but not after an alternative.
    ends_freely_after_prefix: bool = False
    # Above 1, tokens that the target has already become less probable: positive logits are divided by it, others multiplied.
    repetition_penalty: float = 1.0
    # No so many tokens in a row come twice; 0: they may.
    no_repeat_ngram_size: int = 0
    # Sequences of tokens that no target has.
    suppressed: tuple[tuple[int, ...], ...] = ()
    # Tokens that the first one after ``target_prefix`` is not.
    suppressed_first: tuple[int, ...] = ()
    # A token that is not taken unless it is told or wished, and keeps its share of the probability; None: there is none.
    passed_over_id: int | None = None
    # Where Hugging Face's ``generate`` and CTranslate2 differ, whether to do as the former. With beams these rules change
    # log-probabilities then, so that what they forbid keeps its share; the start token counts as one that a target has; and
    # early stopping needs no other rule for a length_penalty of 0.
    rules_of_generate: bool = False
    # Whether a hypothesis that is cut at max_target_tokens has the end-of-sentence token there, at no cost to its score.
    ends_when_cut: bool = False
    prefix_bias: PrefixBias | None = None
    # Tokens that end a hypothesis in the place of the end-of-sentence token, once it has its prefix; none: that token does.
    end_ids: tuple[int, ...] = ()
    # Whether a hypothesis keeps the token that ended it, unless that is the end-of-sentence token.
    return_end_token: bool = False
    # Greedy only.
    sampling: Sampling | None = None
    # Which of several draws of one source this is.
    draw: int = 0

    @property
    def has_token_rules(self) -> bool:
        """Whether all logits of its rows are looked at in every step."""
        return (
            self.repetition_penalty != 1.0
            or self.no_repeat_ngram_size > 0
            or bool(self.suppressed)
            or bool(self.suppressed_first)
            or self.prefix_bias is not None
            or bool(self.end_ids)
            or self.sampling is not None
            # Of the two candidates of a greedy row one may be passed over and the other an end that comes too early.
            or (self.passed_over_id is not None and self.beam_size == 1 and self.min_target_tokens > 0)
        )

    @property
    def needs_attention(self) -> bool:
        """Whether it is looked at what each token attends to."""
        # A greedy search has nothing to choose by its score.
        return self.return_attention or (self.coverage_penalty != 0.0 and (self.beam_size > 1 or self.return_scores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """One finished translation as ids."""

    # Without the start token and the end-of-sentence token; with another that ended it where ``return_end_token`` asked for it.
    target_ids: tuple[int, ...]
    # None: nobody asked for it.
    score: float | None
    finish_reason: FinishReason
    # Tokens decoded, the end-of-sentence token included.
    target_tokens: int
    # The log-probability of each decoded token, the end-of-sentence token included; 0 of a prefix that was forced. Their
    # sum, less ``word_penalty`` for each, is what the score divides by the length. None: nobody asked.
    token_scores: tuple[float, ...] | None = None
    # [target_ids, source_ids]: what share of the attention each source token had, in the layer and the heads that the model
    # tells it of. None: nobody asked.
    attention: NDArray[np.float32] | None = field(default=None, compare=False)


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
    # Called on a worker's thread with each token of the best hypothesis, in their order, as soon as nothing can change it any
    # more, when somebody is streaming. Neither of a model's own prefix nor of the end-of-sentence token.
    # Must not raise: it runs in the middle of a step that others are in.
    on_token: Callable[[int], None] | None = None
    # Set by ``Scheduler.cancel`` alone, which has workers look; its rows are free at the next step.
    cancelled: bool = False
    timings: SequenceTimings = field(default_factory=SequenceTimings)

    @property
    def num_rows(self) -> int:
        """Cache rows it takes while it runs: one for each beam."""
        return self.options.beam_size
