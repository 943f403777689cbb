"""What tokens attended to, from a request to its answer."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.attended import AttendedSource, attended_target
from serving.errors import InvalidRequestError
from serving.manifest import LanguageTokens
from serving.preparation import Direction, TextPreparer, Translation
from serving.request import FinishReason, Hypothesis, Outcome, Sequence
from serving.request_options import RequestOptions
from serving.translator import StreamCommand, TranslateCommand, Translator
from tests.fakes import EOS_ID, UNKNOWN_ID, ByteTokenizer, ScriptedEngine, diagonal, fake_limits, fake_preparer

FAR_S = 1e9


def source(text: str, **changes: Any) -> AttendedSource:
    pieces = tuple(ByteTokenizer().source_pieces(text))
    return replace(AttendedSource(pieces=pieces, tokens_before=0, is_told=True, replaces_unknowns=False), **changes)


def hypothesis(*ids: int, attention: Any) -> Hypothesis:
    weights = np.array(attention, np.float32)
    return Hypothesis(target_ids=ids, score=None, finish_reason=FinishReason.EOS, target_tokens=len(ids) + 1, attention=weights)


def test_only_the_texts_own_tokens_are_told() -> None:
    x, y = ByteTokenizer().encode("xy")
    # Of a language, a, b and the end of the sentence.
    one = hypothesis(x, y, attention=[[0.5, 0.25, 0.125, 0.125], [0.0, 0.25, 0.75, 0.0]])
    target = attended_target(one, source("ab", tokens_before=1), ByteTokenizer())
    assert (target.text, target.pieces) == ("xy", ("x", "y"))
    assert target.attention.tolist() == [[0.25, 0.125], [0.25, 0.75]]


def test_an_unknown_token_becomes_what_it_attended_to_most_of_the_text() -> None:
    (x,) = ByteTokenizer().encode("x")
    rows = [[0.9, 0.0, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0], [0.9, 0.02, 0.05, 0.03]]
    one = hypothesis(x, UNKNOWN_ID, UNKNOWN_ID, UNKNOWN_ID, attention=rows)
    target = attended_target(one, source("ab", tokens_before=1, replaces_unknowns=True), ByteTokenizer())
    # Of equal ones the first, as in CTranslate2.
    assert (target.text, target.pieces) == ("xbab", ("x", "b", "a", "b"))
    plain = attended_target(one, source("ab", tokens_before=1), ByteTokenizer())
    assert (plain.text, plain.pieces) == ("x", ("x", "<2>", "<2>", "<2>"))


def test_where_all_text_is_known_nothing_is_replaced() -> None:
    class Knowing(ByteTokenizer):
        @property
        def unknown_target_id(self) -> None:
            return None

    one = hypothesis(UNKNOWN_ID, attention=[[1.0]])
    assert attended_target(one, source("a", replaces_unknowns=True), Knowing()).text == ""


async def translate(
    engine: ScriptedEngine, *texts: str, preparer: TextPreparer | None = None, **options: Any
) -> list[Translation]:
    translator = Translator(preparer or fake_preparer(), engine, asyncio.get_running_loop())
    return await translator.translate(TranslateCommand(texts=texts, options=RequestOptions(**options), deadline_s=FAR_S))


async def test_pieces_and_attention_come_with_every_hypothesis(engine: ScriptedEngine) -> None:
    options: dict[str, Any] = {"beam_size": 2, "num_hypotheses": 2, "return_attention": True}
    long, blank, short = await translate(engine, "abc", " ", "d", **options)
    assert all(sequence.options.return_attention for sequence in engine.submitted)
    assert (long.source_pieces, short.source_pieces) == (("a", "b", "c"), ("d",))
    best, second = long.hypotheses
    assert (best.target_pieces, second.target_pieces) == (("A", "B", "C"), ("A", "B", "C", "!"))
    assert best.attention is not None
    assert np.array_equal(best.attention, diagonal(3, 4)[:, :3])
    assert best.alignment == ((0, 0), (1, 1), (2, 2))
    # The last attends to the end of the sentence, which is no piece of the text, and then to the first.
    assert second.alignment[3] == (0, 3)
    assert (blank.source_pieces, blank.hypotheses[0].target_pieces, blank.hypotheses[0].alignment) == ((), (), ())


async def test_of_a_text_that_is_cut_what_was_read_is_told(engine: ScriptedEngine) -> None:
    (translation,) = await translate(engine, "abcdef", return_attention=True, max_source_tokens=4)
    assert translation.source_pieces == ("a", "b", "c")
    attention = translation.hypotheses[0].attention
    assert attention is not None
    assert attention.shape[1] == 3


async def test_a_prefix_of_a_blank_text_attends_to_nothing(engine: ScriptedEngine) -> None:
    translator = Translator(fake_preparer(), engine, asyncio.get_running_loop())
    options = RequestOptions(return_attention=True, replace_unknowns=True)
    command = TranslateCommand(texts=(" ",), target_prefixes=("xy",), options=options, deadline_s=FAR_S)
    ((hypothesis,),) = [translation.hypotheses for translation in await translator.translate(command)]
    assert (hypothesis.target_pieces, hypothesis.attention, hypothesis.alignment) == (("x", "y"), None, ())


async def test_nobody_is_told_what_nobody_asked_for(engine: ScriptedEngine) -> None:
    (plain,) = await translate(engine, "abc")
    (replaced,) = await translate(engine, "abc", replace_unknowns=True)
    assert [sequence.options.return_attention for sequence in engine.submitted] == [False, True]
    for translation in (plain, replaced):
        assert translation.source_pieces == translation.hypotheses[0].target_pieces == ()
        assert translation.hypotheses[0].attention is None
        assert translation.hypotheses[0].alignment == ()


async def test_unknown_tokens_are_replaced_whatever_stands_before_the_source(engine: ScriptedEngine) -> None:
    def unknown(sequence: Sequence) -> Outcome:
        ids = (UNKNOWN_ID, *ByteTokenizer().encode("-"), UNKNOWN_ID)
        attention = np.eye(len(sequence.source_ids), dtype=np.float32)[[2, 1, 1]]
        return Outcome(hypotheses=(hypothesis(*ids, attention=attention),))

    engine.script = unknown
    preparer = TextPreparer(
        tokenizer=ByteTokenizer(),
        eos_id=EOS_ID,
        languages=(),
        language_tokens=LanguageTokens(tokens={"de": 901}, before_source="source", before_target=False),
        limits=fake_limits(),
    )
    translator = Translator(preparer, engine, asyncio.get_running_loop())
    command = TranslateCommand(
        texts=("ab",), source_language="de", options=RequestOptions(replace_unknowns=True), deadline_s=FAR_S
    )
    (translation,) = await translator.translate(command)
    assert translation.hypotheses[0].text == "b-a"


async def test_an_answer_that_could_become_too_large_is_refused(engine: ScriptedEngine) -> None:
    preparer = fake_preparer(fake_limits(max_source_tokens=4096, max_target_tokens=4096, max_beam_size=4))
    await translate(engine, "a" * 400, preparer=preparer, return_attention=True)
    with pytest.raises(InvalidRequestError, match=r"could make 1003302 numbers .* at most 524288") as raised:
        await translate(engine, *["a" * 400] * 3, preparer=preparer, return_attention=True)
    assert raised.value.field == "options.return_attention"
    options: dict[str, Any] = {"beam_size": 4, "num_hypotheses": 4}
    with pytest.raises(InvalidRequestError, match=r"options\.return_attention"):
        await translate(engine, "a" * 400, preparer=preparer, return_attention=True, **options)
    await translate(engine, "a" * 400, preparer=preparer, return_attention=True, max_target_tokens=100, **options)
    # Of what is not told, each text is bounded.
    await translate(engine, *["a" * 400] * 3, preparer=preparer, replace_unknowns=True)
    assert len(engine.submitted) == 5


@pytest.mark.parametrize("option", [{"replace_unknowns": True}, {"coverage_penalty": 0.5}], ids=str)
async def test_attention_that_could_become_too_large_to_follow_is_refused(engine: ScriptedEngine, option: dict[str, Any]) -> None:
    preparer = fake_preparer(fake_limits(max_source_tokens=4096, max_target_tokens=4096, max_beam_size=4))
    await translate(engine, "a" * 1000, preparer=preparer, beam_size=2, **option)
    with pytest.raises(InvalidRequestError, match=r"could make 8144136 numbers of a text, at most 4194304") as raised:
        await translate(engine, "a", "a" * 1000, preparer=preparer, beam_size=4, **option)
    assert raised.value.field == f"options.{next(iter(option))}"


async def test_a_stream_tells_it_at_its_end(engine: ScriptedEngine) -> None:
    translator = Translator(fake_preparer(), engine, asyncio.get_running_loop())
    command = StreamCommand(text="abc", options=RequestOptions(return_attention=True), deadline_s=FAR_S)
    async with aclosing(translator.stream(command)) as stream:
        *_, last = [piece async for piece in stream]
    assert last.translation is not None
    assert last.translation.source_pieces == ("a", "b", "c")
    assert last.translation.hypotheses[0].alignment == ((0, 0), (1, 1), (2, 2))


async def test_what_is_replaced_cannot_be_streamed(engine: ScriptedEngine) -> None:
    translator = Translator(fake_preparer(), engine, asyncio.get_running_loop())
    command = StreamCommand(text="abc", options=RequestOptions(replace_unknowns=True), deadline_s=FAR_S)
    with pytest.raises(InvalidRequestError, match="cannot be streamed") as raised:
        await anext(translator.stream(command))
    assert raised.value.field == "options.replace_unknowns"
    assert not engine.submitted


def test_a_preparer_without_a_wish_makes_nothing_of_a_text() -> None:
    preparer = fake_preparer()
    assert preparer.attended("abc", RequestOptions()) is None
    asked = preparer.attended("abc", RequestOptions(return_attention=True), Direction(before_source=(901, 902)))
    assert asked == source("abc", tokens_before=2)
