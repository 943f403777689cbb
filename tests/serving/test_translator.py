from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from serving.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    ShuttingDownError,
)
from serving.preparation import TextPreparer, Translation
from serving.request import Alternatives, DecodingOptions, FinishReason, Outcome, Sampling, Sequence
from serving.request_options import RequestOptions
from serving.translator import StreamCommand, TranslateCommand, Translator
from tests.fakes import (
    EOS_ID,
    PATIENCE_S,
    UNKNOWN_ID,
    ByteTokenizer,
    FakeClock,
    ScriptedEngine,
    fake_limits,
    fake_preparer,
    hold,
    shouted,
)

FAR_S = 1e9


def command(
    *texts: str, prefixes: tuple[str, ...] = (), source_language: str = "", target_language: str = "", **options: Any
) -> TranslateCommand:
    return TranslateCommand(
        texts=texts,
        target_prefixes=prefixes,
        source_language=source_language,
        target_language=target_language,
        options=RequestOptions(**options),
        deadline_s=FAR_S,
    )


def stream_command(text: str, prefix: str = "", **options: Any) -> StreamCommand:
    return StreamCommand(text=text, target_prefix=prefix, options=RequestOptions(**options), deadline_s=FAR_S)


def texts(translations: list[Translation]) -> list[list[str]]:
    return [[hypothesis.text for hypothesis in translation.hypotheses] for translation in translations]


# What is asked for is decoded.


async def test_texts_are_translated_in_their_order(translator: Translator) -> None:
    translations = await translator.translate(command("b", "grün", "a"))
    assert texts(translations) == [["B"], ["GRÜN"], ["A"]]
    assert [translation.source_tokens for translation in translations] == [2, 6, 2]


async def test_the_order_is_kept_when_the_engine_ends_them_in_another(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    task = asyncio.create_task(translator.translate(command("a", "b", "c")))
    running = await asyncio.to_thread(engine.wait_running, 3)
    for sequence in reversed(running):
        engine.end(sequence)
    assert texts(await task) == [["A"], ["B"], ["C"]]


async def test_every_hypothesis_comes_with_its_score_reason_and_timings(translator: Translator) -> None:
    (translation,) = await translator.translate(
        command("ab", beam_size=3, num_hypotheses=2, max_target_tokens=3, return_scores=True)
    )
    best, second = translation.hypotheses
    assert (best.text, best.score, best.finish_reason, best.target_tokens) == ("AB", -0.5, FinishReason.EOS, 3)
    assert (second.text, second.score, second.finish_reason, second.target_tokens) == ("AB!", -1.5, FinishReason.LENGTH, 3)
    assert (translation.timings.queue_s, translation.timings.steps) == (0.25, 7)


async def test_options_reach_the_engine(translator: Translator, engine: ScriptedEngine) -> None:
    asked = command("abc", beam_size=4, num_hypotheses=2, length_penalty=-0.5, min_target_tokens=3, max_target_tokens=9)
    await translator.translate(asked)
    (sequence,) = engine.submitted
    assert sequence.options == DecodingOptions(
        beam_size=4, num_hypotheses=2, length_penalty=-0.5, min_target_tokens=3, max_target_tokens=9, return_scores=False
    )
    assert (sequence.source_ids[-1], sequence.expires_at_s) == (1, FAR_S)


async def test_draws_are_sequences_of_their_own(translator: Translator, engine: ScriptedEngine) -> None:
    drawn = iter((-3.0, -1.0, -2.0))

    def script(sequence: Sequence) -> Outcome:
        (hypothesis,) = shouted(sequence).hypotheses
        score = next(drawn)
        ids = ByteTokenizer().encode(f"{sequence.options.draw}")
        return Outcome(hypotheses=(replace(hypothesis, target_ids=tuple(ids), score=score),))

    engine.script = script
    (translation,) = await translator.translate(command("a", num_hypotheses=3, sampling=Sampling(seed=5), return_scores=True))
    assert [(hypothesis.text, hypothesis.score) for hypothesis in translation.hypotheses] == [
        ("1", -1.0),
        ("2", -2.0),
        ("0", -3.0),
    ]
    assert [sequence.options.draw for sequence in engine.submitted] == [0, 1, 2]


async def test_alternatives_are_decoded_once_their_tokens_are_known(translator: Translator, engine: ScriptedEngine) -> None:
    asked = command("ab", "cd", num_hypotheses=2, beam_size=3, alternatives=Alternatives())
    first, second = await translator.translate(replace(asked, target_prefixes=["A", ""]))
    encode = ByteTokenizer().encode
    expansions, continuations = engine.submitted[:2], engine.submitted[2:]
    assert [(one.options.beam_size, one.options.max_target_tokens) for one in expansions] == [(2, 2), (2, 1)]
    assert [one.options.target_prefix for one in expansions] == [tuple(encode("A")), ()]
    # What the scripted engine says comes after the prefix, cut to one token: "AB" and "AB!", "C" and "C!".
    assert [one.options.target_prefix for one in continuations] == [tuple(encode(text)) for text in ("AB", "AB", "C", "C")]
    assert {one.options.beam_size for one in continuations} == {3}
    assert [len(translation.hypotheses) for translation in (first, second)] == [2, 2]
    (blank,) = await translator.translate(command(" ", num_hypotheses=2, alternatives=Alternatives()))
    assert (len(blank.hypotheses), len(engine.submitted)) == (1, 6)


async def test_a_request_that_was_admitted_goes_on_while_the_server_drains(
    translator: Translator, engine: ScriptedEngine
) -> None:
    def script(sequence: Sequence) -> Outcome:
        engine.drain()
        return shouted(sequence)

    engine.script = script
    (translation,) = await translator.translate(command("ab", num_hypotheses=2, alternatives=Alternatives()))
    assert len(translation.hypotheses) == 2
    with pytest.raises(ShuttingDownError):
        await translator.translate(command("ab"))


async def test_texts_that_are_decoded_several_times_count_as_often(translator: Translator, engine: ScriptedEngine) -> None:
    most = translator.preparer.limits.max_texts_per_request
    asked = command(*["a"] * (most // 2 + 1), num_hypotheses=2, sampling=Sampling())
    with pytest.raises(InvalidRequestError, match=f"at most {most}") as raised:
        await translator.translate(asked)
    assert raised.value.field == "options.num_hypotheses"
    assert engine.submitted == []


async def test_an_error_of_an_alternative_ends_the_request(translator: Translator, engine: ScriptedEngine) -> None:
    def script(sequence: Sequence) -> Outcome | None:
        if not sequence.options.target_prefix:
            return shouted(sequence)
        if len(engine.submitted) > 3:
            return None
        return None if sequence is engine.submitted[1] else Outcome(error=EngineError("a graph failed"))

    engine.script = script
    with pytest.raises(EngineError, match="a graph failed"):
        await translator.translate(command("ab", num_hypotheses=2, alternatives=Alternatives()))
    assert engine.submitted[1].cancelled


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        pytest.param("abc", {}, 40, id="twice the source and 32"),
        pytest.param("a" * 31, {}, 64, id="the limit"),
        pytest.param("abc", {"min_target_tokens": 50}, 51, id="above the minimum"),
        pytest.param("abc", {"min_target_tokens": 64}, 64, id="a minimum at the limit"),
        pytest.param("abc", {"max_target_tokens": 7}, 7, id="as asked"),
    ],
)
async def test_the_longest_target_follows_each_text(
    translator: Translator, engine: ScriptedEngine, text: str, options: dict[str, Any], expected: int
) -> None:
    await translator.translate(command(text, "a much longer neighbour", **options))
    assert engine.submitted[0].options.max_target_tokens == expected


@pytest.mark.parametrize("blank", ["", " ", "\t \n", "\u00a0\u2003"])
async def test_a_blank_text_has_an_empty_translation_without_work(
    translator: Translator, engine: ScriptedEngine, blank: str
) -> None:
    translations = await translator.translate(command(blank, "a", beam_size=2, num_hypotheses=2, return_scores=True))
    assert texts(translations) == [[""], ["A", "A!"]]
    assert (translations[0].hypotheses[0].score, translations[0].hypotheses[0].finish_reason) == (0.0, FinishReason.EOS)
    assert translations[0].source_tokens == 0
    assert len(engine.submitted) == 1


async def test_the_translation_of_a_blank_text_is_its_prefix(translator: Translator, engine: ScriptedEngine) -> None:
    asked = command("a", " ", "", prefixes=("", "xy", ""), return_scores=True, return_token_scores=True)
    free, (prefixed,), (blank,) = [translation.hypotheses for translation in await translator.translate(asked)]
    assert free[0].text == "A"
    assert (prefixed.text, prefixed.score, prefixed.target_tokens) == ("xy", 0.0, 2)
    assert (prefixed.target_pieces, prefixed.token_scores, prefixed.finish_reason) == (("x", "y"), (0.0, 0.0), FinishReason.EOS)
    assert (blank.text, blank.target_pieces, blank.token_scores) == ("", (), ())
    assert len(engine.submitted) == 1


async def test_a_text_is_cut_where_it_is_asked_for(translator: Translator, engine: ScriptedEngine) -> None:
    (cut, short) = await translator.translate(command("abc" * 20, "ab", max_source_tokens=4))
    assert [sequence.source_ids for sequence in engine.submitted] == [
        (*ByteTokenizer().encode("abc"), EOS_ID),
        (*ByteTokenizer().encode("ab"), EOS_ID),
    ]
    assert (cut.source_tokens, short.source_tokens) == (4, 3)


async def test_only_blank_texts_never_reach_the_engine(translator: Translator, engine: ScriptedEngine) -> None:
    engine.refusal = OverloadedError("queue_full", 1.0)
    assert texts(await translator.translate(command("", " "))) == [[""], [""]]


@pytest.mark.parametrize(("source", "target"), [("", ""), ("en", ""), ("", "fr"), ("en", "fr"), ("de", "en")])
async def test_known_languages_pass(translator: Translator, source: str, target: str) -> None:
    assert texts(await translator.translate(command("a", source_language=source, target_language=target))) == [["A"]]


async def test_each_text_has_its_prefix(translator: Translator, engine: ScriptedEngine) -> None:
    await translator.translate(command("a", "", "b", "c", prefixes=("xy", "", "", "z")))
    assert [ByteTokenizer().decode(sequence.options.target_prefix) for sequence in engine.submitted] == ["xy", "", "z"]


async def test_what_is_asked_of_tokens_reaches_each_text(translator: Translator, engine: ScriptedEngine) -> None:
    asked = command("a", "b", suppressed_sequences=(("x", "y"),), end_tokens=(".",), return_end_token=True, suppress_unknown=True)
    await translator.translate(asked)
    x, y, end = ByteTokenizer().encode("xy.")
    for sequence in engine.submitted:
        assert sequence.options.suppressed == ((UNKNOWN_ID,), (x, y))
        assert (sequence.options.end_ids, sequence.options.return_end_token) == ((end,), True)


# What is out of bounds is refused by its name, before any work.


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        pytest.param(command(), "texts", "must not be empty", id="no texts"),
        pytest.param(command("a", "b", prefixes=("x",)), "target_prefixes", "as many as texts, 2, .* not 1", id="few prefixes"),
        pytest.param(command("a", prefixes=("x", "")), "target_prefixes", "as many as texts, 1, .* not 2", id="many prefixes"),
        pytest.param(command("a", "b", prefixes=("", "x\0")), "target_prefixes[1]", "does not have", id="unknown prefix"),
        pytest.param(
            command("a", prefixes=("xyz",), max_target_tokens=3), "target_prefixes[0]", "must be shorter", id="long prefix"
        ),
        pytest.param(command("a", prefix_bias=0.5), "options.prefix_bias", "with a target prefix only", id="bias of nothing"),
        pytest.param(command("a", suppressed_texts=("",)), "options.suppressed_texts[0]", "is blank", id="suppressed text"),
        pytest.param(command("a", end_tokens=("xy",)), "options.end_tokens", "'xy' is no token", id="end token"),
        pytest.param(command(*"abcde"), "texts", "at most 4 in a request, not 5", id="too many texts"),
        pytest.param(command("a", "b" * 32), "texts[1]", "has 33 tokens .* at most 32", id="too long"),
        pytest.param(command("a", max_source_tokens=0), "options.max_source_tokens", "from 1 to 32, not 0", id="cut to none"),
        pytest.param(command("a", max_source_tokens=33), "options.max_source_tokens", "from 1 to 32", id="cut to too many"),
        pytest.param(
            command("a", max_source_tokens=1),
            "options.max_source_tokens",
            "above 1, the tokens that the model adds",
            id="no place",
        ),
        pytest.param(command("a", " " * 99 + "b" * 2000), "texts[1]", "has 2099 characters; at most 32", id="far too long"),
        pytest.param(command("a\ud800"), "texts[0]", "lone surrogate", id="not text"),
        pytest.param(command("a", beam_size=0), "options.beam_size", "from 1 to 5, not 0", id="no beam"),
        pytest.param(command("a", beam_size=-1), "options.beam_size", "from 1 to 5, not -1", id="negative beam"),
        pytest.param(command("a", beam_size=6), "options.beam_size", "from 1 to 5, not 6", id="too wide"),
        pytest.param(command("a", num_hypotheses=0), "options.num_hypotheses", "from 1 to 1", id="no hypotheses"),
        pytest.param(
            command("a", beam_size=3, num_hypotheses=4),
            "options.num_hypotheses",
            r"1 to 3 \(beam_size\), not 4",
            id="too many hypotheses",
        ),
        pytest.param(command("a", num_hypotheses=2), "options.num_hypotheses", "not 2", id="hypotheses without a beam"),
        pytest.param(command("a", length_penalty=math.nan), "options.length_penalty", "not nan", id="penalty nan"),
        pytest.param(command("a", length_penalty=math.inf), "options.length_penalty", "not inf", id="penalty infinite"),
        pytest.param(command("a", length_penalty=10.5), "options.length_penalty", "from -10 to 10, not 10.5", id="penalty"),
        pytest.param(command("a", min_target_tokens=-1), "options.min_target_tokens", "from 0 to 64", id="negative minimum"),
        pytest.param(command("a", min_target_tokens=65), "options.min_target_tokens", "from 0 to 64", id="minimum"),
        pytest.param(command("a", max_target_tokens=0), "options.max_target_tokens", "from 1 to 64", id="no target"),
        pytest.param(command("a", max_target_tokens=65), "options.max_target_tokens", "from 1 to 64", id="too long a target"),
        pytest.param(
            command("a", min_target_tokens=6, max_target_tokens=5),
            "options.min_target_tokens",
            r"0 to 5 \(max_target_tokens\), not 6",
            id="minimum above maximum",
        ),
        pytest.param(command("a", source_language="xx"), "source_language", "from de, en, not from 'xx'", id="source"),
        pytest.param(command("a", target_language="xx"), "target_language", "into de, en, fr, not into 'xx'", id="target"),
        pytest.param(
            command("a", source_language="de", target_language="fr"), "target_language", "into en, not into 'fr'", id="pair"
        ),
    ],
)
async def test_what_is_out_of_bounds_is_refused_by_its_name(
    translator: Translator, engine: ScriptedEngine, asked: TranslateCommand, field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        await translator.translate(asked)
    assert raised.value.field == field
    assert engine.submitted == []


async def test_a_model_that_names_no_languages_takes_no_language() -> None:
    nameless = TextPreparer(tokenizer=ByteTokenizer(), eos_id=1, languages=(), limits=fake_limits())
    nameless.direction("", "")
    with pytest.raises(InvalidRequestError, match="source_language: the model translates from none that it names"):
        nameless.direction("en", "")
    with pytest.raises(InvalidRequestError, match="target_language: the model translates into none that it names"):
        nameless.direction("", "de")


async def test_the_longest_text_that_fits_is_translated(translator: Translator) -> None:
    (translation,) = await translator.translate(command("b" * 31))
    assert translation.source_tokens == 32


# Failures, deadlines, cancellation.


@pytest.mark.parametrize(
    "refusal", [OverloadedError("queue_full", 0.5), ShuttingDownError("the server is shutting down")], ids=["full", "draining"]
)
async def test_a_refusal_of_the_engine_is_passed_on(translator: Translator, engine: ScriptedEngine, refusal: Exception) -> None:
    engine.refusal = refusal
    with pytest.raises(type(refusal)) as raised:
        await translator.translate(command("a"))
    assert raised.value is refusal
    with pytest.raises(type(refusal)):
        await anext(translator.stream(stream_command("a")))


async def test_a_deadline_that_is_over_admits_nothing(engine: ScriptedEngine) -> None:
    clock = FakeClock(500.0)
    translator = Translator(fake_preparer(), engine, asyncio.get_running_loop(), clock=clock)
    with pytest.raises(DeadlineExceededError, match="before the request was admitted"):
        await translator.translate(TranslateCommand(texts=["a"], deadline_s=500.0))
    with pytest.raises(DeadlineExceededError, match="before the request was admitted"):
        await anext(translator.stream(StreamCommand(text="a", deadline_s=499.0)))
    assert engine.submitted == []


async def test_when_one_text_fails_the_others_are_dropped(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    task = asyncio.create_task(translator.translate(command("a", "b", "c")))
    first, second, third = await asyncio.to_thread(engine.wait_running, 3)
    engine.end(first)
    engine.end(second, Outcome(error=EngineError("a graph failed")))
    with pytest.raises(EngineError, match="a graph failed"):
        await task
    assert (first.cancelled, second.cancelled, third.cancelled) == (False, False, True)
    await asyncio.to_thread(engine.wait_running, 0)


async def test_cancelling_the_task_drops_its_sequences(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    task = asyncio.create_task(translator.translate(command("a", "b")))
    running = await asyncio.to_thread(engine.wait_running, 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(sequence.cancelled for sequence in running)
    await asyncio.to_thread(engine.wait_running, 0)


async def test_an_outcome_that_comes_after_all_have_left_is_let_go(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    task = asyncio.create_task(translator.translate(command("a")))
    (sequence,) = await asyncio.to_thread(engine.wait_running, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    sequence.on_outcome(shouted(sequence))
    engine.script = shouted
    assert texts(await translator.translate(command("b"))) == [["B"]]


async def test_others_get_their_turn_while_a_long_request_is_tokenized(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # There seems to be room at first, and then there is none.
    monkeypatch.setattr(engine, "check_room", lambda _: None)
    clock = FakeClock()
    limits = fake_limits(max_texts_per_request=1000)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            clock.now_s += 0.001
            await asyncio.sleep(0)

    class SlowTokenizer(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            clock.now_s += 0.001
            return [20]

        def decode(self, ids: Any) -> str:
            return ""

        certain_text = decode

    slow = TextPreparer(tokenizer=SlowTokenizer(), eos_id=1, languages=(), limits=limits)
    translator = Translator(slow, engine, asyncio.get_running_loop(), clock=clock)
    task = asyncio.create_task(other())

    def refuse(_: Any, *, continued: bool = False) -> None:
        raise OverloadedError("queue_full", 1.0)

    monkeypatch.setattr(engine, "submit", refuse)
    with pytest.raises(OverloadedError):
        await translator.translate(command(*["a"] * 100))
    task.cancel()
    assert turns >= 25


async def test_without_room_nothing_is_tokenized(engine: ScriptedEngine) -> None:
    class NoTokenizer(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            raise AssertionError("tokenized")

        def decode(self, ids: Any) -> str:
            raise AssertionError("decoded")

        certain_text = decode

    preparer = TextPreparer(tokenizer=NoTokenizer(), eos_id=1, languages=(), limits=fake_limits())
    translator = Translator(preparer, engine, asyncio.get_running_loop())
    engine.refusal = OverloadedError("queue_full", 1.0)
    with pytest.raises(OverloadedError):
        await translator.translate(command("a"))


# Streams.


@pytest.mark.parametrize("text", ["hello", "grün, 中文 und 🙂", "x" * 31])
async def test_the_pieces_of_a_stream_are_the_translation(translator: Translator, text: str) -> None:
    async with aclosing(translator.stream(stream_command(text))) as stream:
        pieces = [piece async for piece in stream]
    assert "".join(piece.text_delta for piece in pieces) == text.upper()
    assert all("\ufffd" not in piece.text_delta for piece in pieces)
    assert [piece.translation is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1].translation
    assert last is not None
    assert last.hypotheses[0].text == text.upper()


async def test_text_is_told_before_the_end_and_only_whole_characters(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    async with aclosing(translator.stream(stream_command("aü"))) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        (sequence,) = await asyncio.to_thread(engine.wait_running, 1)
        engine.emit(sequence, b"A")
        assert (await asyncio.wait_for(waiting, PATIENCE_S)).text_delta == "A"
        engine.emit(sequence, "Ü".encode())
        assert (await asyncio.wait_for(anext(stream), PATIENCE_S)).text_delta == "Ü"
        engine.end(sequence)
        last = await asyncio.wait_for(anext(stream), PATIENCE_S)
        assert (last.text_delta, last.translation is not None) == ("", True)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_tokens_that_came_while_the_reader_was_busy_are_not_lost(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    async with aclosing(translator.stream(stream_command("abc"))) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        (sequence,) = await asyncio.to_thread(engine.wait_running, 1)
        engine.emit(sequence, b"A")
        assert (await waiting).text_delta == "A"
        engine.emit(sequence, b"BC")
        engine.end(sequence)
        await asyncio.to_thread(engine.wait_running, 0)
        await asyncio.sleep(0)  # the loop hears of all of it before the reader asks
        rest = [piece async for piece in stream]
    assert "".join(piece.text_delta for piece in rest) == "BC"


async def test_a_blank_text_streams_one_empty_piece(translator: Translator, engine: ScriptedEngine) -> None:
    pieces = [piece async for piece in translator.stream(stream_command(" "))]
    assert [(piece.text_delta, piece.translation is not None) for piece in pieces] == [("", True)]
    assert engine.submitted == []


async def test_a_blank_text_streams_its_prefix(translator: Translator, engine: ScriptedEngine) -> None:
    (piece,) = [piece async for piece in translator.stream(stream_command(" ", "xy"))]
    assert piece.translation is not None
    assert piece.text_delta == piece.translation.hypotheses[0].text == "xy"
    assert engine.submitted == []


async def test_a_text_of_a_stream_is_cut_where_it_is_asked_for(translator: Translator, engine: ScriptedEngine) -> None:
    assert [piece async for piece in translator.stream(stream_command("a" * 40, max_source_tokens=3))]
    assert engine.submitted[0].source_ids == (*ByteTokenizer().encode("aa"), EOS_ID)


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        (stream_command("a", beam_size=9), "options.beam_size", "from 1 to 5, not 9"),
        (stream_command("a", max_target_tokens=0), "options.max_target_tokens", "from 1 to 64"),
        (stream_command("a" * 40), "text", "has 41 tokens"),
        (stream_command("a", "x\0"), "target_prefix", "does not have"),
        (stream_command("a", prefix_bias=0.5), "options.prefix_bias", "with a target prefix only"),
        (stream_command("a", alternatives=Alternatives()), "options.alternatives", "for Translate alone"),
        (stream_command("a", sampling=Sampling(), num_hypotheses=2), "options.num_hypotheses", "for Translate alone"),
        (stream_command("a", end_tokens=("xy",)), "options.end_tokens", "'xy' is no token"),
        (StreamCommand(text="a", source_language="xx", deadline_s=FAR_S), "source_language", "'xx'"),
    ],
    ids=["beam out of bounds", "option", "too long", "prefix", "bias", "alternatives", "draws", "end", "language"],
)
async def test_a_stream_out_of_bounds_is_refused_by_its_name(
    translator: Translator, engine: ScriptedEngine, asked: StreamCommand, field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        await anext(translator.stream(asked))
    assert raised.value.field == field
    assert engine.submitted == []


async def test_a_stream_that_fails_raises_after_what_it_told(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    async with aclosing(translator.stream(stream_command("ab"))) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        (sequence,) = await asyncio.to_thread(engine.wait_running, 1)
        engine.emit(sequence, b"A")
        assert (await waiting).text_delta == "A"
        engine.end(sequence, Outcome(error=EngineError("a graph failed")))
        with pytest.raises(EngineError, match="a graph failed"):
            await anext(stream)


async def test_streams_that_are_left_early_leave_nothing_in_the_engine(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold

    async def read_one_piece() -> None:
        async with aclosing(translator.stream(stream_command("ab"))) as stream:
            await anext(stream)

    tasks = [asyncio.create_task(read_one_piece()) for _ in range(20)]
    running = await asyncio.to_thread(engine.wait_running, 20)
    for sequence in running[:10]:
        engine.emit(sequence, b"A")
    await asyncio.wait(tasks[:10], timeout=PATIENCE_S)
    for task in tasks[10:]:
        task.cancel()
    await asyncio.wait(tasks, timeout=PATIENCE_S)
    await asyncio.to_thread(engine.wait_running, 0)
    assert all(sequence.cancelled for sequence in running)
    assert [task.cancelled() for task in tasks] == [False] * 10 + [True] * 10


async def test_a_stream_has_its_prefix_and_what_is_asked_of_tokens(translator: Translator, engine: ScriptedEngine) -> None:
    pieces = [piece async for piece in translator.stream(stream_command("ab", "xy", end_tokens=(".",)))]
    assert "".join(piece.text_delta for piece in pieces) == "AB"
    (sequence,) = engine.submitted
    assert sequence.options.target_prefix == tuple(ByteTokenizer().encode("xy"))
    assert sequence.options.end_ids == tuple(ByteTokenizer().encode("."))
