"""Languages that a model is told by tokens, and options that a request may set."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from serving.errors import InvalidRequestError
from serving.manifest import DefaultOptions, LanguageTokens
from serving.preparation import UNTOLD, Direction, TextPreparer
from serving.request import Alternatives, PrefixBias, Sampling
from serving.request_options import RequestOptions
from serving.target_tokens import TargetTokens
from tests.fakes import EOS_ID, ByteTokenizer, fake_limits, fake_preparer

CODES = {"de": 901, "en": 902, "fr": 903}


def told(*, before_source: Any, before_target: bool, prefix: tuple[int, ...] = ()) -> TextPreparer:
    return TextPreparer(
        tokenizer=ByteTokenizer(),
        eos_id=EOS_ID,
        languages=(),
        language_tokens=LanguageTokens(tokens=CODES, before_source=before_source, before_target=before_target),
        target_prefix=prefix,
        limits=fake_limits(),
    )


@pytest.mark.parametrize(
    ("preparer", "direction"),
    [
        pytest.param(
            told(before_source="source", before_target=True), Direction(before_source=(902,), before_target=(901,)), id="NLLB"
        ),
        pytest.param(told(before_source="target", before_target=False), Direction(before_source=(901,)), id="OPUS-MT"),
        pytest.param(told(before_source=None, before_target=True), Direction(before_target=(901,)), id="target alone"),
        pytest.param(
            told(before_source=None, before_target=True, prefix=(5,)), Direction(before_target=(901, 5)), id="and a prefix"
        ),
    ],
)
def test_a_direction_is_told_by_tokens(preparer: TextPreparer, direction: Direction) -> None:
    assert preparer.direction("en", "de") == direction
    source = preparer.source_ids("ab", "texts[0]", direction)
    assert source == (*direction.before_source, *ByteTokenizer().encode("ab"), EOS_ID)


@pytest.mark.parametrize(
    ("preparer", "languages", "field", "reason"),
    [
        (told(before_source="source", before_target=True), ("", "de"), "source_language", "has to be set; it knows de, en, fr"),
        (told(before_source="source", before_target=True), ("en", ""), "target_language", "has to be set; it knows de, en, fr"),
        (told(before_source="source", before_target=True), ("xx", "de"), "source_language", "does not know 'xx'; it knows de"),
        (told(before_source="target", before_target=False), ("", ""), "target_language", "has to be set"),
        (told(before_source="target", before_target=False), ("xx", "de"), "source_language", "does not know 'xx'"),
        (told(before_source=None, before_target=True), ("", ">>de<<"), "target_language", "does not know '>>de<<'"),
    ],
)
def test_a_language_that_the_model_cannot_be_told_is_refused(
    preparer: TextPreparer, languages: tuple[str, str], field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        preparer.direction(*languages)
    assert raised.value.field == field


def test_what_every_source_and_target_starts_with_comes_first() -> None:
    preparer = replace(told(before_source="source", before_target=True), source_prefix=(7,))
    assert preparer.direction("en", "de") == Direction(before_source=(7, 902), before_target=(901,))
    untold = replace(preparer, language_tokens=None, target_prefix=(8,))
    assert untold.direction("", "") == Direction(before_source=(7,), before_target=(8,))


def test_of_a_model_that_is_told_its_source_alone_only_its_target_may_be_asked_for() -> None:
    preparer = replace(told(before_source="source", before_target=False), languages=(("de", "en"), ("fr", "en")))
    assert preparer.direction("fr", "en") == Direction(before_source=(903,))
    with pytest.raises(InvalidRequestError, match="target_language: the model translates into en, not into 'de'"):
        preparer.direction("fr", "de")


def test_a_source_that_is_not_told_needs_no_token_where_pairs_name_it() -> None:
    preparer = replace(told(before_source="target", before_target=False), languages=(("cs", "de"), ("cs", "fr")))
    assert preparer.direction("cs", "fr") == preparer.direction("", "fr") == Direction(before_source=(903,))
    with pytest.raises(InvalidRequestError, match="source_language: the model translates from cs, not from 'en'"):
        preparer.direction("en", "fr")
    with pytest.raises(InvalidRequestError, match="target_language: the model does not know 'cs'"):
        preparer.direction("", "cs")


def test_a_source_need_not_end_in_a_token() -> None:
    preparer = replace(told(before_source=None, before_target=False), language_tokens=None, source_ends_with_eos=False)
    assert preparer.source_ids("ab", "text") == tuple(ByteTokenizer().encode("ab"))
    assert len(preparer.source_ids("a" * 32, "text")) == 32
    with pytest.raises(InvalidRequestError, match="has 33 tokens; at most 32"):
        preparer.source_ids("a" * 33, "text")


def test_a_source_may_end_in_its_languages_token() -> None:
    tokens = LanguageTokens(tokens=CODES, before_source=None, after_source="source", before_target=True)
    preparer = replace(told(before_source=None, before_target=True), language_tokens=tokens, source_prefix=(7,))
    direction = preparer.direction("en", "de")
    assert direction == Direction(before_source=(7,), after_source=(902,), before_target=(901,))
    assert preparer.source_ids("ab", "text", direction) == (7, *ByteTokenizer().encode("ab"), EOS_ID, 902)
    assert len(preparer.source_ids("a" * 29, "text", direction)) == 32
    with pytest.raises(InvalidRequestError, match="has 33 tokens"):
        preparer.source_ids("a" * 30, "text", direction)
    with pytest.raises(InvalidRequestError, match="source_language: has to be set"):
        preparer.direction("", "de")
    of_target = replace(preparer, language_tokens=tokens.model_copy(update={"after_source": "target", "before_target": False}))
    assert of_target.direction("", "fr") == Direction(before_source=(7,), after_source=(903,))
    with pytest.raises(InvalidRequestError, match="target_language: has to be set"):
        of_target.direction("en", "")


CHOSEN = DefaultOptions(
    length_penalty=2.0,
    early_stopping=True,
    repetition_penalty=1.2,
    no_repeat_ngram_size=3,
    min_target_tokens=5,
    max_target_tokens=20,
    suppressed=[[4, 5], [6]],
    ends_when_cut=True,
    rules_of_generate=True,
)


def with_defaults(defaults: DefaultOptions) -> TextPreparer:
    return replace(told(before_source=None, before_target=False), language_tokens=None, defaults=defaults)


def test_what_a_request_leaves_open_is_as_the_models_makers_chose() -> None:
    options = with_defaults(CHOSEN).decoding_options(RequestOptions(), 10)
    for name in ("length_penalty", "early_stopping", "repetition_penalty", "no_repeat_ngram_size", "ends_when_cut"):
        assert getattr(options, name) == getattr(CHOSEN, name)
    assert options.rules_of_generate
    assert options.suppressed == ((4, 5), (6,))
    assert (options.beam_size, options.min_target_tokens, options.max_target_tokens) == (1, 5, 20)
    # Where a source makes it shorter, it is.
    longer = with_defaults(CHOSEN.model_copy(update={"max_target_tokens": 60}))
    assert longer.decoding_options(RequestOptions(), 4).max_target_tokens == 40


# As a model of Marian's has them.
MARIAN = DefaultOptions(shrinking_beam=True, word_penalty=0.2, passed_over_id=1, max_target_ratio=2.5)


def test_a_model_of_marians_searches_as_marian_does() -> None:
    preparer = with_defaults(MARIAN)
    options = preparer.decoding_options(RequestOptions(beam_size=4), 5)
    assert (options.shrinking_beam, options.word_penalty, options.passed_over_id) == (True, 0.2, 1)
    # Two and a half times the source, rounded up; and no less than what a request asks for.
    assert options.max_target_tokens == 13
    assert preparer.decoding_options(RequestOptions(max_target_tokens=40), 5).max_target_tokens == 40
    assert preparer.decoding_options(RequestOptions(max_target_ratio=3.0), 5).max_target_tokens == 15
    assert preparer.decoding_options(RequestOptions(), 5, prefix=(7, 8)).max_target_tokens == 34


@pytest.mark.parametrize(
    ("asked", "passed_over_id"),
    [
        (RequestOptions(suppress_unknown=True), 1),
        (RequestOptions(suppress_unknown=False), None),
        (RequestOptions(replace_unknowns=True), None),
    ],
    ids=["suppressed", "taken", "replaced"],
)
def test_a_request_may_have_unknown_tokens(asked: RequestOptions, passed_over_id: int | None) -> None:
    assert with_defaults(MARIAN).decoding_options(asked, 5).passed_over_id == passed_over_id


@pytest.mark.parametrize("asked", [{"suppress_unknown": True}, {"suppress_unknown": True, "replace_unknowns": True}], ids=str)
def test_a_token_that_is_passed_over_keeps_its_share_where_a_request_suppresses_it(asked: dict[str, bool]) -> None:
    tokens = TargetTokens(suppressed=((1,), (1, 5)))
    options = with_defaults(MARIAN).decoding_options(RequestOptions(**asked), 5, tokens=tokens)  # type: ignore[arg-type]  # flags
    assert (options.passed_over_id, options.suppressed) == (1, ((1, 5),))


def test_one_who_says_when_beams_stop_does_not_get_the_models_own_way_of_it() -> None:
    preparer = with_defaults(MARIAN)
    assert not preparer.decoding_options(RequestOptions(beam_size=4, early_stopping=True), 5).shrinking_beam
    both = RequestOptions(beam_size=4, early_stopping=True, shrinking_beam=True)
    assert preparer.decoding_options(both, 5).shrinking_beam


def test_a_request_has_its_own_way() -> None:
    asked = {
        "length_penalty": 0.5,
        "early_stopping": False,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_target_tokens": 0,
        "max_target_tokens": 50,
        "shrinking_beam": False,
    }
    options = with_defaults(CHOSEN.model_copy(update={"shrinking_beam": True})).decoding_options(RequestOptions(**asked), 10)  # type: ignore[arg-type]  # one of each type
    assert {name: getattr(options, name) for name in asked} == asked


def test_the_models_shortest_length_gives_way_to_a_callers_longest() -> None:
    preparer, asked = with_defaults(CHOSEN), RequestOptions(max_target_tokens=3)
    preparer.check_options(asked)
    options = preparer.decoding_options(asked, 10)
    assert (options.min_target_tokens, options.max_target_tokens) == (3, 3)
    # And the model's longest to a caller's shortest.
    assert preparer.decoding_options(RequestOptions(min_target_tokens=30), 10).max_target_tokens == 31


def test_patience_has_a_meaning_where_the_model_stops_early_by_itself() -> None:
    with_defaults(CHOSEN).check_options(RequestOptions(patience=2.0, beam_size=4))
    with pytest.raises(InvalidRequestError, match=r"with options\.early_stopping only"):
        with_defaults(CHOSEN).check_options(RequestOptions(patience=2.0, beam_size=4, early_stopping=False))


def test_the_source_language_may_stay_open_where_no_token_tells_it() -> None:
    assert told(before_source="target", before_target=False).direction("", "fr") == Direction(before_source=(903,))


@pytest.mark.parametrize(
    ("preparer", "source"),
    [
        (fake_preparer(), (*ByteTokenizer().encode("abcd"), EOS_ID)),
        (replace(fake_preparer(), source_ends_with_eos=False), tuple(ByteTokenizer().encode("abcde"))),
        (told(before_source="source", before_target=True), (902, *ByteTokenizer().encode("abc"), EOS_ID)),
    ],
    ids=["ended", "not ended", "language first"],
)
def test_what_the_model_adds_to_a_source_is_not_cut(preparer: TextPreparer, source: tuple[int, ...]) -> None:
    direction = preparer.direction("en", "fr")
    assert preparer.source_ids("abcdefg", "texts[0]", direction, max_tokens=5) == source
    assert preparer.source_ids(" ", "texts[0]", direction, max_tokens=5) == ()


def test_a_text_of_any_length_is_cut_where_that_is_asked_for() -> None:
    ids = fake_preparer().source_ids("ab" * 500_000, "texts[0]", Direction(), max_tokens=3)
    assert ids == (*ByteTokenizer().encode("ab"), EOS_ID)


def test_a_language_after_the_end_of_a_source_is_not_cut() -> None:
    direction = Direction(before_source=(7,), after_source=(902,))
    source = fake_preparer().source_ids("abcdefg", "texts[0]", direction, max_tokens=5)
    assert source == (7, *ByteTokenizer().encode("ab"), EOS_ID, 902)
    with pytest.raises(InvalidRequestError, match=r"^options\.max_source_tokens: must be above 3, the tokens"):
        fake_preparer().source_ids("abcdefg", "texts[0]", direction, max_tokens=3)


def test_no_length_of_a_blank_text_bounds_its_prefix() -> None:
    assert len(fake_preparer().prefix_ids("abcd", "target_prefix", RequestOptions(max_target_ratio=1.0), 0)) == 4


def test_language_tokens_spelled_out_in_a_text_stay_text() -> None:
    preparer = told(before_source="target", before_target=False)
    ids = preparer.source_ids(">>fr<< a", "texts[0]", preparer.direction("", "de"))
    assert ids[0] == CODES["de"]
    assert not set(ids[1:]) & set(CODES.values())


def test_the_token_of_a_language_counts_for_the_longest_source() -> None:
    preparer = told(before_source="source", before_target=True)
    direction = preparer.direction("en", "de")
    assert len(preparer.source_ids("a" * 30, "text", direction)) == 32
    with pytest.raises(InvalidRequestError, match="has 33 tokens"):
        preparer.source_ids("a" * 31, "text", direction)


def test_the_models_own_prefix_is_hidden_and_no_part_of_a_callers_lengths() -> None:
    preparer = told(before_source="source", before_target=True, prefix=(5,))
    options = preparer.decoding_options(
        RequestOptions(min_target_tokens=3, max_target_tokens=9), 4, preparer.direction("en", "fr")
    )
    assert (options.target_prefix, options.hidden_prefix_tokens) == ((903, 5), 2)
    assert (options.min_target_tokens, options.max_target_tokens) == (5, 11)


def test_texts_of_one_request_draw_apart_and_the_same_again() -> None:
    preparer = replace(told(before_source=None, before_target=False), language_tokens=None)
    asked = RequestOptions(sampling=Sampling(seed=7, top_k=4))

    def seeds() -> list[int]:
        options = [preparer.decoding_options(asked, 4, UNTOLD, place) for place in range(3)]
        return [one.sampling.seed for one in options if one.sampling is not None]

    assert seeds() == seeds()
    assert len(set(seeds())) == 3
    assert seeds()[0] == 7


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"patience": 2.0}, "patience", "with options.early_stopping only"),
        ({"patience": 0.0, "early_stopping": True}, "patience", "from 0.1 to 10, not 0"),
        ({"patience": math.nan, "early_stopping": True}, "patience", "not nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", "from 0.01 to 100, not 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty", "not inf"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size", "from 0 to 64, not -1"),
        ({"sampling": Sampling(), "beam_size": 2}, "sampling", "options.beam_size must be 1, not 2"),
        ({"sampling": Sampling(top_k=-1)}, "sampling.top_k", "from 0 to"),
        ({"sampling": Sampling(top_p=0.0)}, "sampling.top_p", "above 0 and at most 1, not 0"),
        ({"sampling": Sampling(top_p=math.nan)}, "sampling.top_p", "not nan"),
        ({"sampling": Sampling(temperature=0.0)}, "sampling.temperature", "from 0.01 to 100, not 0"),
        ({"sampling": Sampling(seed=-1)}, "sampling.seed", "from 0 to"),
        ({"prefix_bias": 0.0}, "prefix_bias", "above 0 and below 1, not 0"),
        ({"prefix_bias": 1.0}, "prefix_bias", "above 0 and below 1, not 1"),
        ({"prefix_bias": math.nan}, "prefix_bias", "not nan"),
        ({"suppressed_texts": ("a",) * 129}, "suppressed_texts", "at most 128, not 129"),
        ({"suppressed_texts": ("a" * 2048, "b" * 2049)}, "suppressed_texts", "at most 4096 characters together, not 4097"),
        ({"suppressed_sequences": (("a",),) * 129}, "suppressed_sequences", "at most 128, not 129"),
        ({"suppressed_sequences": (("a",), ())}, "suppressed_sequences[1]", "from 1 to 32 tokens, not 0"),
        ({"suppressed_sequences": (("a",) * 33,)}, "suppressed_sequences[0]", "from 1 to 32 tokens, not 33"),
        ({"end_tokens": ("a",) * 33}, "end_tokens", "at most 32, not 33"),
        ({"coverage_penalty": -0.1}, "coverage_penalty", "from 0 to 10, not -0.1"),
        ({"coverage_penalty": math.nan}, "coverage_penalty", "not nan"),
        ({"alternatives": Alternatives(min_probability=1.5)}, "alternatives.min_probability", "from 0 to 1, not 1.5"),
        ({"alternatives": Alternatives(), "prefix_bias": 0.5}, "alternatives", "leave out options.prefix_bias"),
        ({"alternatives": Alternatives(), "num_hypotheses": 6}, "num_hypotheses", "from 1 to 5, not 6"),
        ({"sampling": Sampling(), "num_hypotheses": 6}, "num_hypotheses", "from 1 to 5, not 6"),
        ({"num_hypotheses": 2}, "num_hypotheses", "from 1 to 1 .beam_size., not 2"),
        ({"max_target_ratio": 0.0}, "max_target_ratio", "above 0 and at most 100, not 0"),
        ({"max_target_ratio": math.inf}, "max_target_ratio", "not inf"),
        ({"min_target_ratio": -1.0}, "min_target_ratio", "from 0 to 100, not -1"),
        ({"min_target_ratio": math.nan}, "min_target_ratio", "not nan"),
        ({"min_target_ratio": 2.0, "max_target_ratio": 1.5}, "min_target_ratio", "from 0 to 1.5, not 2"),
    ],
)
def test_options_out_of_bounds_are_refused_by_name(options: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        told(before_source=None, before_target=False).check_options(RequestOptions(**options))
    assert raised.value.field == f"options.{field}"


@pytest.mark.parametrize(
    ("options", "source_tokens", "expected"),
    [
        ({"max_target_ratio": 1.5}, 7, (0, 10)),
        ({"max_target_ratio": 0.01}, 7, (0, 1)),
        ({"max_target_ratio": 0.29}, 100, (0, 29)),
        ({"max_target_ratio": 50.0}, 7, (0, 64)),
        ({"max_target_ratio": 2.0, "max_target_tokens": 9}, 7, (0, 9)),
        ({"max_target_ratio": 1.0, "max_target_tokens": 9}, 7, (0, 7)),
        ({"min_target_ratio": 1.5}, 7, (11, 46)),
        ({"min_target_ratio": 1.1}, 10, (11, 52)),
        ({"min_target_ratio": 0.5, "min_target_tokens": 6}, 7, (6, 46)),
        ({"min_target_ratio": 9.0}, 7, (63, 64)),
        ({"min_target_ratio": 99.0}, 7, (64, 64)),
        ({"min_target_ratio": 1.0, "max_target_ratio": 1.0}, 7, (7, 7)),
        ({"min_target_tokens": 20, "max_target_ratio": 1.0}, 7, (7, 7)),
        ({"min_target_ratio": 2.0, "max_target_tokens": 9}, 7, (9, 9)),
    ],
)
def test_lengths_follow_the_source_where_ratios_are_given(
    options: dict[str, Any], source_tokens: int, expected: tuple[int, int]
) -> None:
    found = fake_preparer().decoding_options(RequestOptions(**options), source_tokens)
    assert (found.min_target_tokens, found.max_target_tokens) == expected


def test_a_prefix_follows_the_models_own_and_is_no_hidden_part() -> None:
    preparer = told(before_source="source", before_target=True, prefix=(5,))
    direction = preparer.direction("en", "fr")
    options = preparer.decoding_options(RequestOptions(max_target_tokens=9), 4, direction, prefix=(20, 21))
    assert (options.target_prefix, options.hidden_prefix_tokens) == ((903, 5, 20, 21), 2)
    assert options.max_target_tokens == 11
    assert options.prefix_bias is None


def test_a_prefix_that_is_wished_for_leaves_only_the_models_own_forced() -> None:
    preparer = told(before_source="source", before_target=True)
    direction, asked = preparer.direction("en", "fr"), RequestOptions(prefix_bias=0.5)
    options = preparer.decoding_options(asked, 4, direction, prefix=(20, 21))
    assert options.target_prefix == (903,)
    assert options.prefix_bias == PrefixBias(tokens=(903, 20, 21), strength=0.5)
    free = preparer.decoding_options(asked, 4, direction)
    assert (free.target_prefix, free.prefix_bias) == ((903,), None)


def test_tokens_of_a_request_reach_its_decoding() -> None:
    tokens = TargetTokens(suppressed=((4, 5),), end_ids=(6,))
    options = fake_preparer().decoding_options(RequestOptions(return_end_token=True), 4, tokens=tokens)
    assert (options.suppressed, options.end_ids, options.return_end_token) == (((4, 5),), (6,), True)


def test_a_models_own_ends_hold_unless_a_request_names_others() -> None:
    preparer = fake_preparer()
    assert (preparer.end_ids, preparer.end_tokens) == ((EOS_ID,), (f"<{EOS_ID}>",))
    assert preparer.decoding_options(RequestOptions(), 4).end_ids == ()
    several = replace(preparer, defaults=DefaultOptions(end_ids=[EOS_ID, 20], suppressed_first=[EOS_ID, 7]))
    assert several.end_ids == (EOS_ID, 20)
    assert several.end_tokens == tuple(several.tokenizer.target_pieces([EOS_ID, 20]))
    options = several.decoding_options(RequestOptions(), 4)
    assert (options.end_ids, options.suppressed_first) == ((EOS_ID, 20), (EOS_ID, 7))
    asked = RequestOptions(end_tokens=(".",))
    assert several.decoding_options(asked, 4, tokens=several.target_tokens(asked)).end_ids == tuple(ByteTokenizer().encode("."))
    named = several.target_tokens(RequestOptions(end_tokens=several.end_tokens))
    assert named.end_ids == (EOS_ID, 20)


def test_an_end_counts_once_however_often_it_is_named() -> None:
    preparer = replace(fake_preparer(), defaults=DefaultOptions(end_ids=[20, EOS_ID, 20]))
    assert preparer.decoding_options(RequestOptions(), 4).end_ids == (20, EOS_ID)
    assert preparer.target_tokens(RequestOptions(end_tokens=(".", "a", "."))).end_ids == tuple(ByteTokenizer().encode(".a"))


@pytest.mark.parametrize(
    ("prefix", "options", "longest"),
    [
        ("ab", {"max_target_tokens": 3}, 3),
        ("ab", {"max_target_ratio": 1.0}, 4),
        ("a" * 20, {}, 52),
        ("a" * 63, {}, 64),
    ],
)
def test_a_prefix_that_is_shorter_than_its_translation(prefix: str, options: dict[str, Any], longest: int) -> None:
    preparer, asked = fake_preparer(), RequestOptions(**options)
    ids = preparer.prefix_ids(prefix, "target_prefix", asked, 4)
    assert preparer.decoding_options(asked, 4, prefix=ids).max_target_tokens == longest


@pytest.mark.parametrize(
    ("prefix", "options", "source_tokens", "reason"),
    [
        ("abc", {"max_target_tokens": 3}, 4, "has 3 tokens; must be shorter than its translation, which has at most 3"),
        ("abcd", {"max_target_ratio": 1.0}, 4, "has 4 tokens; must be shorter than its translation, which has at most 4"),
        ("a" * 64, {}, 4, "has 64 tokens; must be shorter than its translation, which has at most 64"),
        ("abc", {"max_target_tokens": 3}, 0, "has 3 tokens; must be shorter than its translation, which has at most 3"),
    ],
)
def test_a_prefix_that_is_its_whole_translation_is_refused_by_name(
    prefix: str, options: dict[str, Any], source_tokens: int, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        fake_preparer().prefix_ids(prefix, "target_prefixes[3]", RequestOptions(**options), source_tokens)
    assert raised.value.field == "target_prefixes[3]"


def test_options_that_were_checked_are_what_they_were_after_many_others() -> None:
    preparer = with_defaults(CHOSEN)
    asked = [RequestOptions(beam_size=4, length_penalty=i / 256) for i in range(600)]
    for _ in range(2):
        for i, options in enumerate(asked):
            preparer.check_options(options)
            decoding = preparer.decoding_options(options, 10)
            assert (decoding.beam_size, decoding.length_penalty) == (4, i / 256)
            assert decoding.no_repeat_ngram_size == CHOSEN.no_repeat_ngram_size
    assert 0 < len(preparer._filled) <= 256


@pytest.mark.parametrize(
    "options",
    [
        RequestOptions(suppressed_texts=("a",)),
        RequestOptions(suppressed_sequences=(("a",),)),
        RequestOptions(end_tokens=("a",)),
    ],
)
def test_options_that_may_be_large_are_not_remembered(options: RequestOptions) -> None:
    preparer = fake_preparer()
    for _ in range(2):
        preparer.check_options(options)
    assert not preparer._filled


def test_options_that_were_refused_are_refused_again() -> None:
    preparer = fake_preparer()
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match=r"^options\.beam_size"):
            preparer.check_options(RequestOptions(beam_size=99))


def test_one_models_defaults_are_not_anothers() -> None:
    plain, chosen, asked = fake_preparer(), with_defaults(CHOSEN), RequestOptions()
    for preparer in (plain, chosen):
        preparer.check_options(asked)
    assert plain.decoding_options(asked, 10).no_repeat_ngram_size == 0
    assert chosen.decoding_options(asked, 10).no_repeat_ngram_size == CHOSEN.no_repeat_ngram_size > 0
    # A copy with other defaults does not remember those of the first.
    assert replace(chosen, defaults=DefaultOptions()).decoding_options(asked, 10).no_repeat_ngram_size == 0
