from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from serving.errors import InvalidRequestError
from serving.request_options import RequestOptions
from serving.target_tokens import NO_TOKENS, TargetTokens, prefix_ids, target_tokens
from tests.fakes import EOS_ID, UNKNOWN_ID, ByteTokenizer

ENDS = (EOS_ID,)


def ids(text: str) -> tuple[int, ...]:
    return tuple(ByteTokenizer().encode(text))


class SourceOnly(ByteTokenizer):
    unknown_target_id = None

    def encode_target(self, text: str) -> list[int] | None:
        raise ValueError("cuts sources only")


def test_options_that_ask_for_nothing_come_to_no_tokens() -> None:
    assert target_tokens(RequestOptions(), ByteTokenizer(), ENDS) == NO_TOKENS == TargetTokens()


@pytest.mark.parametrize(
    ("options", "suppressed"),
    [
        ({"suppressed_texts": ("ab", "c")}, (ids("ab"), ids(" ab"), ids("c"), ids(" c"))),
        ({"suppressed_texts": ("a\0b",)}, ()),
        ({"suppressed_sequences": (("a", "b"), ("c",))}, (ids("ab"), ids("c"))),
        ({"suppress_unknown": True}, ((UNKNOWN_ID,),)),
        ({"suppress_unknown": False}, ()),
        ({"suppress_unknown": True, "suppressed_texts": ("a",)}, ((UNKNOWN_ID,), ids("a"), ids(" a"))),
    ],
    ids=["texts", "what no target holds", "tokens", "unknown", "unknown allowed", "both"],
)
def test_what_is_suppressed(options: dict[str, Any], suppressed: tuple[tuple[int, ...], ...]) -> None:
    assert target_tokens(RequestOptions(**options), ByteTokenizer(), ENDS).suppressed == suppressed


def test_where_all_text_is_known_there_is_no_unknown_token_to_suppress() -> None:
    assert target_tokens(RequestOptions(suppress_unknown=True), SourceOnly(), ENDS) == NO_TOKENS


def test_end_tokens_are_those_of_the_targets_vocabulary() -> None:
    assert target_tokens(RequestOptions(end_tokens=(".", "!")), ByteTokenizer(), ENDS).end_ids == ids(".!")


def test_the_models_own_ends_are_named_as_the_vocabulary_spells_them() -> None:
    options = RequestOptions(end_tokens=(".", f"<{EOS_ID}>"))
    assert target_tokens(options, ByteTokenizer(), ENDS).end_ids == (*ids("."), EOS_ID)
    with pytest.raises(
        InvalidRequestError, match=rf"'<{EOS_ID}>' is no token of text .*, nor the model's own end, '<8>' or '<9>'$"
    ):
        target_tokens(options, ByteTokenizer(), (8, 9))


def test_a_model_whose_vocabulary_does_not_spell_its_end() -> None:
    class Unspelled(ByteTokenizer):
        def target_pieces(self, ids: Sequence[int]) -> list[str]:
            return [""] * len(ids)

    with pytest.raises(InvalidRequestError, match=r"'' is no token of text in the model's target vocabulary$"):
        target_tokens(RequestOptions(end_tokens=("",)), Unspelled(), ENDS)


@pytest.mark.parametrize(
    ("options", "field", "reason"),
    [
        ({"suppressed_texts": ("a", " ")}, "suppressed_texts[1]", "is blank"),
        ({"suppressed_texts": ("a" * 33,)}, "suppressed_texts[0]", "has 34 tokens; at most 32"),
        ({"suppressed_texts": ("\ud800",)}, "suppressed_texts[0]", "lone surrogate"),
        ({"suppressed_sequences": (("a",), ("b", "ab"))}, "suppressed_sequences[1]", "'ab' is no token of text"),
        ({"end_tokens": (".", "")}, "end_tokens", "'' is no token of text"),
    ],
)
def test_what_is_no_such_text_or_token_is_refused_by_name(options: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        target_tokens(RequestOptions(**options), ByteTokenizer(), ENDS)
    assert raised.value.field == f"options.{field}"


@pytest.mark.parametrize(("text", "expected"), [("ab", ids("ab")), ("", ()), (" \n", ())])
def test_a_prefix_is_its_tokens(text: str, expected: tuple[int, ...]) -> None:
    assert prefix_ids(text, "target_prefix", ByteTokenizer(), 8) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\0b", "holds characters that the model's target vocabulary does not have"),
        ("a" * 513, "has 513 characters; a translation has at most 8 tokens"),
        ("\ud800", "lone surrogate"),
    ],
)
def test_a_prefix_that_the_model_cannot_write_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        prefix_ids(text, "target_prefixes[2]", ByteTokenizer(), 8)
    assert raised.value.field == "target_prefixes[2]"


def test_a_tokenizer_of_sources_alone_refuses_text_of_targets() -> None:
    with pytest.raises(InvalidRequestError, match="target_prefix: cuts sources only"):
        prefix_ids("a", "target_prefix", SourceOnly(), 8)
    with pytest.raises(InvalidRequestError, match=r"options.suppressed_texts\[0\]: cuts sources only"):
        target_tokens(RequestOptions(suppressed_texts=("a",)), SourceOnly(), ENDS)
