"""From what a caller asks to what the engine decodes, and back: bounds, defaults, tokens.

Knows text, options, limits and the tokenizer; does not know the engine, threads, event loops, messages or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from serving.errors import InvalidRequestError
from serving.request import DecodingOptions, FinishReason, Hypothesis, Outcome, Sequence, SequenceTimings
from serving.tokenizer import Tokenizer

_T = TypeVar("_T")

# Beyond this, length alone decides. It also keeps length^length_penalty far within what a float holds.
_MAX_LENGTH_PENALTY = 10.0
# A text of more characters than this for each token it may have is refused before it is tokenized, because tokenizing megabytes
# would hold up everybody else. A SentencePiece piece has at most 16 characters unless a model was trained otherwise.
_MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How the caller wants it decoded; None takes the default."""

    # Hypotheses kept alive at each step; default 1, greedy.
    beam_size: int | None = None
    # Hypotheses returned for each text; default 1.
    num_hypotheses: int | None = None
    # score = log-probability / length^length_penalty; default 1.
    length_penalty: float | None = None
    # The end-of-sentence token is not taken before so many tokens; default 0.
    min_target_tokens: int | None = None
    # A hypothesis ends at so many tokens; the default is for each text twice its source tokens and 32 more, within the limit.
    max_target_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextHypothesis:
    """One translation of one text."""

    text: str
    score: float
    finish_reason: FinishReason
    # Tokens decoded, the end-of-sentence token included.
    target_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What came of one text; hypotheses are best first, at least one."""

    hypotheses: tuple[TextHypothesis, ...]
    # Tokens the encoder read, the end-of-sentence token included; 0 for a blank text, which is not encoded.
    source_tokens: int
    timings: SequenceTimings = field(default_factory=SequenceTimings)


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslationLimits:
    """What the server and the model together allow."""

    max_texts_per_request: int
    # With the end-of-sentence token.
    max_source_tokens: int
    max_target_tokens: int
    max_beam_size: int
    max_request_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What a caller may know of the model and its server, beside languages and limits."""

    name: str
    version: str
    server_version: str
    precision: str
    device: str


# A blank text has nothing to translate; its translation is certain and empty.
BLANK = Translation(
    hypotheses=(TextHypothesis(text="", score=0.0, finish_reason=FinishReason.EOS, target_tokens=0),), source_tokens=0
)


def _default(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _bounded(name: str, value: int, low: int, high: int, high_is: str = "") -> int:
    if not low <= value <= high:
        raise InvalidRequestError(f"options.{name}", f"must be from {low} to {high}{high_is}, not {value}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPreparer:
    """The rules of one model. Pure: the same text and options give the same ids."""

    tokenizer: Tokenizer
    eos_id: int
    # (source, target) pairs.
    languages: tuple[tuple[str, str], ...]
    limits: TranslationLimits

    def check_languages(self, source_language: str, target_language: str) -> None:
        """Refuse a pair that the model does not translate; an empty string leaves that side open.

        Raises:
            InvalidRequestError: naming ``source_language`` or ``target_language``.
        """
        targets = [target for source, target in self.languages if source_language in ("", source)]
        if source_language and not targets:
            known = ", ".join(sorted({source for source, _ in self.languages})) or "none that it names"
            raise InvalidRequestError("source_language", f"the model translates from {known}, not from {source_language[:20]!r}")
        if target_language and target_language not in targets:
            known = ", ".join(sorted(set(targets))) or "none that it names"
            raise InvalidRequestError("target_language", f"the model translates into {known}, not into {target_language[:20]!r}")

    def check_options(self, options: RequestOptions) -> None:
        """Refuse options out of bounds, before any text is looked at.

        Raises:
            InvalidRequestError: naming the option as the protocol spells it, for example ``options.beam_size``.
        """
        limits = self.limits
        beam_size = _bounded("beam_size", _default(options.beam_size, 1), 1, limits.max_beam_size)
        _bounded("num_hypotheses", _default(options.num_hypotheses, 1), 1, beam_size, " (beam_size)")
        penalty = _default(options.length_penalty, 1.0)
        if not (math.isfinite(penalty) and abs(penalty) <= _MAX_LENGTH_PENALTY):
            reason = f"must be from {-_MAX_LENGTH_PENALTY:g} to {_MAX_LENGTH_PENALTY:g}, not {penalty:g}"
            raise InvalidRequestError("options.length_penalty", reason)
        if options.max_target_tokens is None:
            _bounded("min_target_tokens", _default(options.min_target_tokens, 0), 0, limits.max_target_tokens)
        else:
            longest = _bounded("max_target_tokens", options.max_target_tokens, 1, limits.max_target_tokens)
            _bounded("min_target_tokens", _default(options.min_target_tokens, 0), 0, longest, " (max_target_tokens)")

    def check_greedy(self, options: RequestOptions) -> None:
        """Refuse a beam where text is sent as it is decoded: a beam commits to nothing before its end.

        Raises:
            InvalidRequestError: naming ``options.beam_size``.
        """
        self.check_options(options)
        if _default(options.beam_size, 1) != 1:
            raise InvalidRequestError("options.beam_size", f"must be 1 to stream, not {options.beam_size}")

    def check_count(self, num_texts: int) -> None:
        """Refuse a request without texts, or with too many.

        Raises:
            InvalidRequestError: naming ``texts``.
        """
        if num_texts == 0:
            raise InvalidRequestError("texts", "must not be empty")
        if num_texts > self.limits.max_texts_per_request:
            raise InvalidRequestError("texts", f"at most {self.limits.max_texts_per_request} in a request, not {num_texts}")

    def source_ids(self, text: str, field_name: str) -> tuple[int, ...]:
        """Tokens of one text with the end-of-sentence token; empty for a blank text.

        Args:
            text: what to translate.
            field_name: how the protocol calls it, for example ``texts[3]``.

        Raises:
            InvalidRequestError: the text is longer than the model reads, or not text. Nothing is cut silently.
        """
        if not text or text.isspace():
            return ()
        longest = self.limits.max_source_tokens
        if len(text) > longest * _MAX_CHARACTERS_PER_TOKEN:
            reason = f"has {len(text)} characters; at most {longest} tokens can be translated at once"
            raise InvalidRequestError(field_name, reason)
        try:
            ids = self.tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise InvalidRequestError(field_name, "holds a lone surrogate, which is not text") from error
        if not ids:
            return ()
        if len(ids) + 1 > longest:
            reason = f"has {len(ids) + 1} tokens with the end-of-sentence token; at most {longest} can be translated at once"
            raise InvalidRequestError(field_name, reason)
        return (*ids, self.eos_id)

    def decoding_options(self, options: RequestOptions, source_tokens: int) -> DecodingOptions:
        """Checked options with their defaults filled in for a source of ``source_tokens`` tokens.

        The default of max_target_tokens is twice the source and 32 more: far above what a translation takes, and low enough that
        a hypothesis that repeats itself does not run to the limit. It is of the text alone, so neighbours change nothing.
        """
        shortest = _default(options.min_target_tokens, 0)
        rule = max(2 * source_tokens + 32, shortest + 1)
        return DecodingOptions(
            beam_size=_default(options.beam_size, 1),
            num_hypotheses=_default(options.num_hypotheses, 1),
            length_penalty=_default(options.length_penalty, 1.0),
            min_target_tokens=shortest,
            max_target_tokens=_default(options.max_target_tokens, min(rule, self.limits.max_target_tokens)),
        )

    def sequence(
        self,
        source_ids: tuple[int, ...],
        options: RequestOptions,
        *,
        arrived_at_s: float,
        expires_at_s: float,
        on_outcome: Callable[[Outcome], None],
        on_token: Callable[[int], None] | None = None,
    ) -> Sequence:
        """One source as the engine takes it; times in monotonic seconds, callbacks as ``Sequence`` says."""
        return Sequence(
            source_ids=source_ids,
            options=self.decoding_options(options, len(source_ids)),
            arrived_at_s=arrived_at_s,
            expires_at_s=expires_at_s,
            on_outcome=on_outcome,
            on_token=on_token,
        )

    def translation(self, source_tokens: int, outcome: Outcome) -> Translation:
        """The text of a successful outcome."""
        return Translation(
            hypotheses=tuple(self._hypothesis(hypothesis) for hypothesis in outcome.hypotheses),
            source_tokens=source_tokens,
            timings=outcome.timings,
        )

    def _hypothesis(self, hypothesis: Hypothesis) -> TextHypothesis:
        return TextHypothesis(
            text=self.tokenizer.decode(list(hypothesis.target_ids)),
            score=hypothesis.score,
            finish_reason=hypothesis.finish_reason,
            target_tokens=hypothesis.target_tokens,
        )
