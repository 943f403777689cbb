"""From what a caller asks to what the engine decodes, and back: defaults, tokens, text.

Knows text, options, limits and the tokenizer; does not know the engine, threads, event loops, messages or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from serving.attended import AttendedSource, attended_target
from serving.errors import InvalidRequestError
from serving.manifest import DefaultOptions, LanguageTokens
from serving.plan import Plan, make_plan
from serving.request import DecodingOptions, FinishReason, Hypothesis, Outcome, PrefixBias, Sequence, SequenceTimings
from serving.request_options import (
    RequestOptions,
    TranslationLimits,
    check_attention,
    check_options,
    default,
)
from serving.target_tokens import MAX_CHARACTERS_PER_TOKEN, NO_TOKENS, TargetTokens, prefix_ids, target_tokens, tokenized
from serving.tokenizers import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextHypothesis:
    """One translation of one text."""

    text: str
    # None: nobody asked for it.
    score: float | None
    finish_reason: FinishReason
    # Tokens decoded, the end-of-sentence token included.
    target_tokens: int
    # Where it was asked for: its tokens as the vocabulary spells them, and the share of each one's attention that each of the
    # source's pieces had, [its pieces, the source's].
    target_pieces: tuple[str, ...] = ()
    attention: NDArray[np.float32] | None = field(default=None, compare=False)
    # Where they were asked for: of its pieces, and of the end-of-sentence token where it was decoded.
    token_scores: tuple[float, ...] = ()

    @property
    def alignment(self) -> tuple[tuple[int, int], ...]:
        """Of each target piece, the place of the source piece that it attended to most, and its own."""
        return () if self.attention is None else tuple((int(row.argmax()), place) for place, row in enumerate(self.attention))


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """What came of one text; hypotheses are best first, at least one."""

    hypotheses: tuple[TextHypothesis, ...]
    # Tokens the encoder read, the end-of-sentence token included; 0 for a blank text, which is not encoded.
    source_tokens: int
    timings: SequenceTimings = field(default_factory=SequenceTimings)
    # Of the text, where attention was asked for.
    source_pieces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What a caller may know of the model and its server, beside languages and limits."""

    name: str
    version: str
    server_version: str
    precision: str
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Direction:
    """What a model is told of the languages of a request: tokens around a source and before its target."""

    before_source: tuple[int, ...] = ()
    # After the end-of-sentence token.
    after_source: tuple[int, ...] = ()
    before_target: tuple[int, ...] = ()


# Of a model that need not be told.
UNTOLD = Direction()
# Options that are remembered.
_MOST_FILLED = 256


def _some(codes: Iterable[str], most: int = 20) -> str:
    """A few of many codes, for a person."""
    known = sorted(codes)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPreparer:
    """The rules of one model. Pure: the same text and options give the same ids."""

    tokenizer: Tokenizer
    eos_id: int
    # (source, target) pairs; none: any of the tokens' languages into any other, or whatever the model translates.
    languages: tuple[tuple[str, str], ...]
    language_tokens: LanguageTokens | None = None
    # What every source and every target starts with.
    source_prefix: tuple[int, ...] = ()
    source_ends_with_eos: bool = True
    target_prefix: tuple[int, ...] = ()
    defaults: DefaultOptions = field(default_factory=DefaultOptions)
    limits: TranslationLimits
    # Options that were checked, of late, and what the model's defaults made of them: clients ask for the same again and again.
    # None with lists, which may be long.
    _filled: dict[RequestOptions, RequestOptions] = field(default_factory=dict, init=False, repr=False, compare=False)

    def direction(self, source_language: str, target_language: str) -> Direction:
        """What the model is told of a pair of languages.

        Args:
            source_language: empty leaves it open, where the model need not be told.
            target_language: likewise.

        Raises:
            InvalidRequestError: naming ``source_language`` or ``target_language``: the model does not translate it, or has to be
                told and was not.
        """
        told = self.language_tokens
        if told is None:
            self._check_pair(source_language, target_language)
            return Direction(before_source=self.source_prefix, before_target=self.target_prefix)
        for name, code, is_needed in (
            ("source_language", source_language, "source" in (told.before_source, told.after_source)),
            ("target_language", target_language, told.before_target or "target" in (told.before_source, told.after_source)),
        ):
            # One that need not be told may have no token, where pairs say what the model translates.
            if code not in told.tokens and (is_needed or (code and not self.languages)):
                reason = f"the model does not know {code[:20]!r}" if code else "has to be set"
                raise InvalidRequestError(name, f"{reason}; it knows {_some(told.tokens)}")
        if self.languages:
            self._check_pair(source_language, target_language)
        codes = {"source": source_language, "target": target_language}

        def tokens(side: Literal["source", "target"] | None) -> tuple[int, ...]:
            return () if side is None else (told.tokens[codes[side]],)

        return Direction(
            before_source=(*self.source_prefix, *tokens(told.before_source)),
            after_source=tokens(told.after_source),
            before_target=(*((told.tokens[target_language],) if told.before_target else ()), *self.target_prefix),
        )

    def _check_pair(self, source_language: str, target_language: str) -> None:
        targets = [target for source, target in self.languages if source_language in ("", source)]
        if source_language and not targets:
            known = ", ".join(sorted({source for source, _ in self.languages})) or "none that it names"
            raise InvalidRequestError("source_language", f"the model translates from {known}, not from {source_language[:20]!r}")
        if target_language and target_language not in targets:
            known = ", ".join(sorted(set(targets))) or "none that it names"
            raise InvalidRequestError("target_language", f"the model translates into {known}, not into {target_language[:20]!r}")

    def check_options(self, options: RequestOptions) -> None:
        """Refuse options out of bounds; see ``request_options.check_options``."""
        if not options.has_lists and options in self._filled:
            return
        filled = self._with_defaults(options)
        check_options(filled, self.limits)
        if not options.has_lists:
            if len(self._filled) >= _MOST_FILLED:
                self._filled.clear()
            self._filled[options] = filled

    def _with_defaults(self, options: RequestOptions) -> RequestOptions:
        """Options with the model's own in the place of those that are not set, but for the longest length."""
        if not options.has_lists and (known := self._filled.get(options)) is not None:
            return known
        defaults = self.defaults
        # A caller who wants it short means it.
        longest = default(options.max_target_tokens, self.limits.max_target_tokens)
        # One who says when beams stop does not want the model's other way of it.
        shrinking_beam = defaults.shrinking_beam and not options.early_stopping
        return replace(
            options,
            length_penalty=default(options.length_penalty, defaults.length_penalty),
            early_stopping=default(options.early_stopping, defaults.early_stopping),
            shrinking_beam=default(options.shrinking_beam, shrinking_beam),
            repetition_penalty=default(options.repetition_penalty, defaults.repetition_penalty),
            no_repeat_ngram_size=default(options.no_repeat_ngram_size, defaults.no_repeat_ngram_size),
            min_target_tokens=default(options.min_target_tokens, min(defaults.min_target_tokens, longest)),
        )

    def check_count(self, num_texts: int, options: RequestOptions) -> None:
        """Refuse a request without texts, or with too many, those that are decoded several times counted as often.

        Raises:
            InvalidRequestError: naming ``texts`` or ``options.num_hypotheses``.
        """
        if num_texts == 0:
            raise InvalidRequestError("texts", "must not be empty")
        if num_texts > self.limits.max_texts_per_request:
            raise InvalidRequestError("texts", f"at most {self.limits.max_texts_per_request} in a request, not {num_texts}")
        wanted = num_texts * options.sequences_per_text
        if wanted > self.limits.max_texts_per_request:
            reason = f"makes {wanted} of {num_texts} texts, drawn or as alternatives; at most {self.limits.max_texts_per_request}"
            raise InvalidRequestError("options.num_hypotheses", reason)

    def source_ids(
        self, text: str, field_name: str, direction: Direction = UNTOLD, *, max_tokens: int | None = None
    ) -> tuple[int, ...]:
        """Tokens of one text, with what sources start and end with; empty for a blank text.

        Args:
            text: what to translate.
            field_name: how the protocol calls it, for example ``texts[3]``.
            direction: what the model is told of its languages.
            max_tokens: ``max_source_tokens`` of its options.

        Raises:
            InvalidRequestError: the text is longer than the model reads, or not text. Nothing is cut that is not asked to be.
        """
        if not text or text.isspace():
            return ()
        longest = self.limits.max_source_tokens
        longest_text = longest * MAX_CHARACTERS_PER_TOKEN
        if max_tokens is not None:
            # Its first tokens are far within these characters.
            text = text[:longest_text]
        if len(text) > longest_text:
            reason = f"has {len(text)} characters; at most {longest} tokens can be translated at once"
            raise InvalidRequestError(field_name, reason)
        ids = tokenized(self.tokenizer.encode, text, field_name)
        if not ids:
            return ()
        end = (self.eos_id,) if self.source_ends_with_eos else ()
        source = (*direction.before_source, *ids[: self._place_for_text(direction, max_tokens)], *end, *direction.after_source)
        if len(source) > longest:
            counted = " with the end-of-sentence token" if self.source_ends_with_eos else ""
            reason = f"has {len(source)} tokens{counted}; at most {longest} can be translated at once"
            raise InvalidRequestError(field_name, reason)
        return source

    def _place_for_text(self, direction: Direction, max_tokens: int | None) -> int | None:
        """How many tokens of its own a source may have that is cut to so many in all; None: it is not cut.

        Raises:
            InvalidRequestError: naming the option: there is no place for text.
        """
        if max_tokens is None:
            return None
        added = len(direction.before_source) + self.source_ends_with_eos + len(direction.after_source)
        if max_tokens <= added:
            raise InvalidRequestError("options.max_source_tokens", f"must be above {added}, the tokens that the model adds")
        return max_tokens - added

    def target_tokens(self, options: RequestOptions) -> TargetTokens:
        """What checked options suppress and end at, as tokens; see ``target_tokens.target_tokens``."""
        return target_tokens(options, self.tokenizer, self.end_ids)

    def _newly_suppressed(self, tokens: TargetTokens) -> Iterator[tuple[int, ...]]:
        """What a request suppresses, but for a token that the model passes over already: that keeps its share."""
        return (sequence for sequence in tokens.suppressed if sequence != (self.defaults.passed_over_id,))

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a target where no request says otherwise, each once."""
        return tuple(dict.fromkeys(self.defaults.end_ids)) or (self.eos_id,)

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The same as the vocabulary spells them, and as a request names them."""
        return tuple(filter(None, self.tokenizer.target_pieces(self.end_ids)))

    def prefix_ids(self, text: str, field_name: str, options: RequestOptions, source_tokens: int) -> tuple[int, ...]:
        """Tokens of a target prefix; empty for a blank one.

        Args:
            text: what the translation starts with.
            field_name: how the protocol calls it, for example ``target_prefixes[3]``.
            options: checked.
            source_tokens: of its text; 0: that is blank.

        Raises:
            InvalidRequestError: the prefix is not shorter than the translation may be, or it is nothing that the model can write.
        """
        ids = prefix_ids(text, field_name, self.tokenizer, self.limits.max_target_tokens)
        if not ids:
            return ()
        filled = self._with_defaults(options)
        # What a prefix of a blank text may have, no length of its source says.
        filled = filled if source_tokens else replace(filled, min_target_ratio=None, max_target_ratio=None)
        _, longest = self._lengths(filled, source_tokens, len(ids))
        if len(ids) >= longest:
            reason = f"has {len(ids)} tokens; must be shorter than its translation, which has at most {longest}"
            raise InvalidRequestError(field_name, reason)
        return ids

    def check_attention(self, options: RequestOptions, lengths: Iterable[tuple[int, int]]) -> None:
        """Refuse an answer that could become too large; lengths are tokens of the sources and of their target prefixes.

        Raises:
            InvalidRequestError: naming the option that asks for attention.
        """
        if options.needs_attention or options.coverage_penalty:
            filled = self._with_defaults(options)
            check_attention(options, ((source, self._lengths(filled, source, prefix)[1]) for source, prefix in lengths))

    def _lengths(self, options: RequestOptions, source_tokens: int, prefix_tokens: int) -> tuple[int, int]:
        """Fewest and most target tokens, by options that have the model's defaults.

        The default of the most is twice the source and 32 more: far above what a translation takes, and low enough that a
        hypothesis that repeats itself does not run to the limit. It is of the text alone, so neighbours change nothing. Where the
        model has a default of its own, it is the lower of the two; and it is 32 more than a prefix at least. A model's own ratio
        takes the place of that rule.
        """

        def times_source(ratio: float) -> float:
            return round(ratio * source_tokens, 9)  # 0.29 x 100 is a little less than 29

        shortest = max(default(options.min_target_tokens, 0), math.ceil(times_source(default(options.min_target_ratio, 0.0))))
        longest = default(options.max_target_tokens, self.limits.max_target_tokens)
        if options.max_target_ratio is not None:
            longest = min(longest, max(1, math.floor(times_source(options.max_target_ratio))))
        elif options.max_target_tokens is None:
            ratio = self.defaults.max_target_ratio
            # Rounded as Marian does.
            rule = 2 * source_tokens + 32 if ratio is None else math.ceil(times_source(ratio))
            rule = min(rule, default(self.defaults.max_target_tokens, longest))
            longest = min(longest, max(rule, shortest + 1, prefix_tokens + 32 if prefix_tokens else 0))
        return min(shortest, longest), longest

    def decoding_options(
        self,
        options: RequestOptions,
        source_tokens: int,
        direction: Direction = UNTOLD,
        place: int = 0,
        *,
        tokens: TargetTokens = NO_TOKENS,
        prefix: tuple[int, ...] = (),
    ) -> DecodingOptions:
        """Checked options with their defaults filled in for a source of ``source_tokens`` tokens.

        ``place`` is that of the text in its request: what is drawn for it follows from it and the seed. ``tokens`` are those of
        ``options``, ``prefix`` is what the text's translation starts with.
        """
        defaults, options = self.defaults, self._with_defaults(options)
        shortest, longest = self._lengths(options, source_tokens, len(prefix))
        # The model's own prefix is no part of the answer, and of no length that a caller gives.
        hidden = len(direction.before_target)
        is_forced = options.prefix_bias is None or not prefix
        wished = (*direction.before_target, *prefix)
        sampling = options.sampling
        may_be_unknown = not options.suppress_unknown and (options.suppress_unknown is False or bool(options.replace_unknowns))
        return DecodingOptions(
            beam_size=default(options.beam_size, 1),
            num_hypotheses=default(options.num_hypotheses, 1),
            length_penalty=default(options.length_penalty, 1.0),
            min_target_tokens=shortest + hidden,
            max_target_tokens=longest + hidden,
            return_scores=default(options.return_scores, False),
            early_stopping=default(options.early_stopping, False),
            patience=default(options.patience, 1.0),
            shrinking_beam=default(options.shrinking_beam, False),
            word_penalty=defaults.word_penalty,
            repetition_penalty=default(options.repetition_penalty, 1.0),
            no_repeat_ngram_size=default(options.no_repeat_ngram_size, 0),
            rules_of_generate=defaults.rules_of_generate,
            ends_when_cut=defaults.ends_when_cut,
            sampling=None if sampling is None else replace(sampling, seed=sampling.seed + (place << 64)),
            target_prefix=wished if is_forced else direction.before_target,
            hidden_prefix_tokens=hidden,
            prefix_bias=None if is_forced else PrefixBias(tokens=wished, strength=default(options.prefix_bias, 0.0)),
            suppressed=(*map(tuple, defaults.suppressed), *self._newly_suppressed(tokens)),
            suppressed_first=tuple(defaults.suppressed_first),
            passed_over_id=None if may_be_unknown else defaults.passed_over_id,
            end_ids=tokens.end_ids or (self.end_ids if defaults.end_ids else ()),
            return_end_token=default(options.return_end_token, False),
            return_attention=options.needs_attention,
            coverage_penalty=default(options.coverage_penalty, 0.0),
            return_token_scores=default(options.return_token_scores, False),
        )

    def plan(
        self,
        options: RequestOptions,
        source_tokens: int,
        *,
        direction: Direction = UNTOLD,
        place: int = 0,
        tokens: TargetTokens = NO_TOKENS,
        prefix: tuple[int, ...] = (),
    ) -> Plan:
        """The sequences that a text takes; arguments are those of ``decoding_options``."""
        decoding = self.decoding_options(options, source_tokens, direction, place, tokens=tokens, prefix=prefix)
        return make_plan(decoding, options.alternatives)

    def sequence(
        self,
        source_ids: tuple[int, ...],
        options: RequestOptions,
        *,
        direction: Direction = UNTOLD,
        place: int = 0,
        tokens: TargetTokens = NO_TOKENS,
        prefix: tuple[int, ...] = (),
        arrived_at_s: float,
        expires_at_s: float,
        on_outcome: Callable[[Outcome], None],
        on_token: Callable[[int], None] | None = None,
    ) -> Sequence:
        """One source as the engine takes it.

        ``place``, ``tokens`` and ``prefix`` are as ``decoding_options`` says, callbacks as ``Sequence`` says; times are monotonic
        seconds.
        """
        return Sequence(
            source_ids=source_ids,
            options=self.decoding_options(options, len(source_ids), direction, place, tokens=tokens, prefix=prefix),
            arrived_at_s=arrived_at_s,
            expires_at_s=expires_at_s,
            on_outcome=on_outcome,
            on_token=on_token,
        )

    def blank(self, options: RequestOptions, prefix: tuple[int, ...] = ()) -> Translation:
        """A blank text has nothing to translate; its translation is certain, and no more than its prefix."""
        ids = list(prefix)
        pieces = self.tokenizer.target_pieces(ids) if options.return_attention or options.return_token_scores else ()
        hypothesis = TextHypothesis(
            text=self.tokenizer.decode(ids),
            score=0.0 if options.return_scores else None,
            finish_reason=FinishReason.EOS,
            target_tokens=len(ids),
            target_pieces=tuple(pieces),
            token_scores=(0.0,) * len(ids) if options.return_token_scores else (),
        )
        return Translation(hypotheses=(hypothesis,), source_tokens=0)

    def attended(self, text: str, options: RequestOptions, direction: Direction = UNTOLD) -> AttendedSource | None:
        """What is asked of the attention to a text that has tokens; None: nothing."""
        if not options.needs_attention:
            return None
        return AttendedSource(
            pieces=tuple(self.tokenizer.source_pieces(text)[: self._place_for_text(direction, options.max_source_tokens)]),
            tokens_before=len(direction.before_source),
            is_told=bool(options.return_attention),
            replaces_unknowns=bool(options.replace_unknowns),
        )

    def translation(self, source_tokens: int, outcome: Outcome, attended: AttendedSource | None = None) -> Translation:
        """The text of a successful outcome; ``attended`` is what ``attended`` made of its source."""
        return Translation(
            hypotheses=tuple(self._hypothesis(hypothesis, attended) for hypothesis in outcome.hypotheses),
            source_tokens=source_tokens,
            timings=outcome.timings,
            source_pieces=attended.pieces if attended is not None and attended.is_told else (),
        )

    def _hypothesis(self, hypothesis: Hypothesis, attended: AttendedSource | None) -> TextHypothesis:
        ids = list(hypothesis.target_ids)
        target = None if attended is None else attended_target(hypothesis, attended, self.tokenizer)
        told = target if attended is not None and attended.is_told else None
        pieces: tuple[str, ...] = ()
        if told is not None or hypothesis.token_scores is not None:
            pieces = tuple(self.tokenizer.target_pieces(ids)) if target is None else target.pieces
        return TextHypothesis(
            text=self.tokenizer.decode(ids) if target is None else target.text,
            score=hypothesis.score,
            finish_reason=hypothesis.finish_reason,
            target_tokens=hypothesis.target_tokens,
            target_pieces=pieces,
            attention=None if told is None else told.attention,
            token_scores=hypothesis.token_scores or (),
        )
