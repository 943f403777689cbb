"""What a caller may ask of decoding, and the bounds of it.

Knows options and limits; does not know text, tokens, languages, messages or the engine.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from serving.errors import InvalidRequestError
from serving.request import Alternatives, Sampling

_T = TypeVar("_T")

# Beyond this, length alone decides. It also keeps length^length_penalty far within what a float holds.
_MAX_LENGTH_PENALTY = 10.0
_MAX_COVERAGE_PENALTY = 10.0
_LEAST_PATIENCE, _MOST_PATIENCE = 0.1, 10.0
_MOST_REPETITION_PENALTY = 100.0
_LEAST_TEMPERATURE, _MOST_TEMPERATURE = 0.01, 100.0
_MOST_TOP_K = 2**31 - 1
_MOST_RATIO = 100.0
# Each is looked for in every row of every step, while all others wait.
_MOST_SUPPRESSED = 128
MOST_SUPPRESSED_TOKENS = 32
# Of all texts together; they are cut into tokens at once.
_MOST_SUPPRESSED_CHARACTERS = 4096
_MOST_END_TOKENS = 32
# Shares of attention as many as there could be: in an answer, which is written while all others wait and is to be below the 4 MiB
# that gRPC's clients take by default, and of the hypotheses of one text, which a worker keeps while they run.
_MOST_ANSWERED = 2**19
_MOST_FOLLOWED = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """How the caller wants it decoded; None takes the default, which is the model's own where its bundle has one."""

    # Hypotheses kept alive at each step; default 1, greedy.
    beam_size: int | None = None
    # Hypotheses returned for each text: those of one search, draws where it samples, or alternatives; default 1.
    num_hypotheses: int | None = None
    # score = log-probability / length^length_penalty, the log-probability less the model's own penalty of each token; default 1.
    length_penalty: float | None = None
    # The end-of-sentence token is not taken before so many tokens; default 0.
    min_target_tokens: int | None = None
    # A hypothesis ends at so many tokens; the default is for each text twice its source tokens and 32 more, and 32 more than
    # its prefix, within the limit; none where max_target_ratio is set.
    max_target_tokens: int | None = None
    # Whether hypotheses carry their scores; default False, which makes greedy decoding faster.
    return_scores: bool | None = None
    # With beams: stop when ``patience`` times ``beam_size`` hypotheses have ended; default False: when none can become better.
    early_stopping: bool | None = None
    patience: float | None = None
    # With beams: whether hypotheses that end are not replaced by others that run; default False.
    shrinking_beam: bool | None = None
    # Above 1, tokens that the target has already become less probable; default 1.
    repetition_penalty: float | None = None
    # No so many tokens in a row come twice; default 0, they may.
    no_repeat_ngram_size: int | None = None
    # Draw tokens instead of taking the most probable ones; default None.
    sampling: Sampling | None = None
    # How strongly target prefixes pull, above 0 and below 1; default None, they are forced.
    prefix_bias: float | None = None
    # What no translation has: texts, in all forms of ``Tokenizer.target_forms``, and tokens as the vocabulary spells them.
    suppressed_texts: tuple[str, ...] = ()
    suppressed_sequences: tuple[tuple[str, ...], ...] = ()
    # Whether the unknown token is never taken; default False.
    suppress_unknown: bool | None = None
    # Lengths for each token of the source, its end-of-sentence token and language included; beside the absolute ones.
    min_target_ratio: float | None = None
    max_target_ratio: float | None = None
    # Tokens that end a hypothesis in the place of the model's own, which may be one of them; whether it keeps the one that did,
    # default False.
    end_tokens: tuple[str, ...] = ()
    return_end_token: bool | None = None
    # Whether hypotheses carry their pieces and what these attended to in the source; default False.
    return_attention: bool | None = None
    # Whether an unknown token becomes the piece of the source that it attended to most; default False.
    replace_unknowns: bool | None = None
    # Added to a score for source tokens that got less than 1 of the attention; default 0.
    coverage_penalty: float | None = None
    # Whether hypotheses carry their pieces and the score of each; default False.
    return_token_scores: bool | None = None
    # Hypotheses differ in the token after the prefix; default None.
    alternatives: Alternatives | None = None
    # A text of more tokens, with those that the model adds, is cut to so many; default None, one that is too long is refused.
    max_source_tokens: int | None = None

    @property
    def has_lists(self) -> bool:
        """Whether it holds more than some numbers."""
        return bool(self.suppressed_texts or self.suppressed_sequences or self.end_tokens)

    @property
    def needs_attention(self) -> bool:
        """Whether the engine has to tell it."""
        return bool(self.return_attention or self.replace_unknowns)

    @property
    def sequences_per_text(self) -> int:
        """Hypotheses of a text that are decoded apart from each other; see ``serving.plan``."""
        return default(self.num_hypotheses, 1) if self.alternatives is not None or self.sampling is not None else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslationLimits:
    """What the server and the model together allow."""

    max_texts_per_request: int
    # With the end-of-sentence token.
    max_source_tokens: int
    max_target_tokens: int
    max_beam_size: int
    max_request_s: float


def default(value: _T | None, otherwise: _T) -> _T:
    """What was asked for, or else this."""
    return otherwise if value is None else value


def _bounded(name: str, value: int, low: int, high: int, high_is: str = "") -> int:
    if not low <= value <= high:
        raise InvalidRequestError(f"options.{name}", f"must be from {low} to {high}{high_is}, not {value}")
    return value


def _bounded_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN too
        raise InvalidRequestError(f"options.{name}", f"must be from {low:g} to {high:g}, not {value:g}")


def check_options(options: RequestOptions, limits: TranslationLimits) -> None:
    """Refuse options out of bounds, before any text is looked at.

    Raises:
        InvalidRequestError: naming the option as the protocol spells it, for example ``options.beam_size``.
    """
    beam_size = _bounded("beam_size", default(options.beam_size, 1), 1, limits.max_beam_size)
    if options.alternatives is not None or options.sampling is not None:
        _bounded("num_hypotheses", default(options.num_hypotheses, 1), 1, limits.max_beam_size)
    else:
        _bounded("num_hypotheses", default(options.num_hypotheses, 1), 1, beam_size, " (beam_size)")
    if options.alternatives is not None:
        if options.prefix_bias is not None:
            raise InvalidRequestError("options.alternatives", "come after a prefix that is forced: leave out options.prefix_bias")
        _bounded_number("alternatives.min_probability", options.alternatives.min_probability, 0.0, 1.0)
    _bounded_number("coverage_penalty", default(options.coverage_penalty, 0.0), 0.0, _MAX_COVERAGE_PENALTY)
    penalty = default(options.length_penalty, 1.0)
    if not (math.isfinite(penalty) and abs(penalty) <= _MAX_LENGTH_PENALTY):
        reason = f"must be from {-_MAX_LENGTH_PENALTY:g} to {_MAX_LENGTH_PENALTY:g}, not {penalty:g}"
        raise InvalidRequestError("options.length_penalty", reason)
    if options.max_source_tokens is not None:
        _bounded("max_source_tokens", options.max_source_tokens, 1, limits.max_source_tokens)
    _check_beams(options, beam_size)
    _check_token_rules(options, limits)
    _check_lists(options)
    _check_ratios(options)
    if options.max_target_tokens is None:
        _bounded("min_target_tokens", default(options.min_target_tokens, 0), 0, limits.max_target_tokens)
    else:
        longest = _bounded("max_target_tokens", options.max_target_tokens, 1, limits.max_target_tokens)
        _bounded("min_target_tokens", default(options.min_target_tokens, 0), 0, longest, " (max_target_tokens)")


def _check_beams(options: RequestOptions, beam_size: int) -> None:
    _bounded_number("patience", default(options.patience, 1.0), _LEAST_PATIENCE, _MOST_PATIENCE)
    if options.patience is not None and not options.early_stopping:
        raise InvalidRequestError("options.patience", "has a meaning with options.early_stopping only")
    if options.sampling is not None and beam_size != 1:
        raise InvalidRequestError("options.sampling", f"draws greedily: options.beam_size must be 1, not {beam_size}")


def _check_lists(options: RequestOptions) -> None:
    for name, count, most in (
        ("suppressed_texts", len(options.suppressed_texts), _MOST_SUPPRESSED),
        ("suppressed_sequences", len(options.suppressed_sequences), _MOST_SUPPRESSED),
        ("end_tokens", len(options.end_tokens), _MOST_END_TOKENS),
    ):
        if count > most:
            raise InvalidRequestError(f"options.{name}", f"at most {most}, not {count}")
    characters = sum(map(len, options.suppressed_texts))
    if characters > _MOST_SUPPRESSED_CHARACTERS:
        reason = f"at most {_MOST_SUPPRESSED_CHARACTERS} characters together, not {characters}"
        raise InvalidRequestError("options.suppressed_texts", reason)
    for place, tokens in enumerate(options.suppressed_sequences):
        _bounded(f"suppressed_sequences[{place}]", len(tokens), 1, MOST_SUPPRESSED_TOKENS, " tokens")
    if options.prefix_bias is not None and not 0 < options.prefix_bias < 1:
        raise InvalidRequestError("options.prefix_bias", f"must be above 0 and below 1, not {options.prefix_bias:g}")


def _check_ratios(options: RequestOptions) -> None:
    most = options.max_target_ratio
    if most is not None and not 0 < most <= _MOST_RATIO:
        raise InvalidRequestError("options.max_target_ratio", f"must be above 0 and at most {_MOST_RATIO:g}, not {most:g}")
    _bounded_number("min_target_ratio", default(options.min_target_ratio, 0.0), 0.0, default(most, _MOST_RATIO))


def _check_token_rules(options: RequestOptions, limits: TranslationLimits) -> None:
    penalty = default(options.repetition_penalty, 1.0)
    _bounded_number("repetition_penalty", penalty, 1 / _MOST_REPETITION_PENALTY, _MOST_REPETITION_PENALTY)
    _bounded("no_repeat_ngram_size", default(options.no_repeat_ngram_size, 0), 0, limits.max_target_tokens)
    if (sampling := options.sampling) is not None:
        _bounded("sampling.top_k", sampling.top_k, 0, _MOST_TOP_K)
        if not 0 < sampling.top_p <= 1:
            raise InvalidRequestError("options.sampling.top_p", f"must be above 0 and at most 1, not {sampling.top_p:g}")
        _bounded_number("sampling.temperature", sampling.temperature, _LEAST_TEMPERATURE, _MOST_TEMPERATURE)
        _bounded("sampling.seed", sampling.seed, 0, 2**63 - 1)


def check_prefixes(target_prefixes: Collection[str], num_texts: int, options: RequestOptions) -> None:
    """Refuse prefixes that are not one a text, before any text is looked at.

    Raises:
        InvalidRequestError: naming ``target_prefixes``, or ``options.prefix_bias`` where there are none.
    """
    if target_prefixes and len(target_prefixes) != num_texts:
        reason = f"must be as many as texts, {num_texts}, or none at all, not {len(target_prefixes)}"
        raise InvalidRequestError("target_prefixes", reason)
    check_bias(options, is_prefixed=bool(target_prefixes))


def check_bias(options: RequestOptions, *, is_prefixed: bool) -> None:
    """Refuse a strength that nothing has.

    Raises:
        InvalidRequestError: naming ``options.prefix_bias``.
    """
    if options.prefix_bias is not None and not is_prefixed:
        raise InvalidRequestError("options.prefix_bias", "has a meaning with a target prefix only")


def check_attention(options: RequestOptions, sizes: Iterable[tuple[int, int]]) -> None:
    """Refuse attention that could become too large, for an answer or for a worker.

    Args:
        options: of the request.
        sizes: source tokens and most target tokens of each of its texts.

    Raises:
        InvalidRequestError: naming the option that asks for it.
    """
    asked = {
        "return_attention": options.return_attention,
        "replace_unknowns": options.replace_unknowns,
        "coverage_penalty": options.coverage_penalty,
    }
    name = next((name for name, value in asked.items() if value), None)
    if name is None:
        return
    shares = [source * target for source, target in sizes]
    num_hypotheses = default(options.num_hypotheses, 1)
    followed = max(default(options.beam_size, 1), num_hypotheses) * max(shares, default=0)
    if followed > _MOST_FOLLOWED:
        reason = f"could make {followed} numbers of a text, at most {_MOST_FOLLOWED} can be followed; use fewer beams"
        raise InvalidRequestError(f"options.{name}", f"{reason}, or set options.max_target_tokens")
    answered = num_hypotheses * sum(shares)
    if options.return_attention and answered > _MOST_ANSWERED:
        reason = f"could make {answered} numbers of this request, at most {_MOST_ANSWERED} can be answered at once"
        raise InvalidRequestError("options.return_attention", f"{reason}; send fewer texts, or set options.max_target_tokens")


def check_streamed(options: RequestOptions) -> None:
    """Refuse what is known at the end of a translation only, or is several of them.

    Raises:
        InvalidRequestError: naming the option.
    """
    check_one_sequence(options)
    if options.replace_unknowns:
        raise InvalidRequestError("options.replace_unknowns", "cannot be streamed: what was sent is never taken back")


def check_one_sequence(options: RequestOptions) -> None:
    """Refuse hypotheses that are decoded apart from each other.

    Raises:
        InvalidRequestError: naming the option.
    """
    if options.alternatives is not None or options.sequences_per_text > 1:
        name = "options.num_hypotheses" if options.alternatives is None else "options.alternatives"
        raise InvalidRequestError(name, "several translations of a text, drawn or as alternatives, are for Translate alone")
