from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from serving.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    ShuttingDownError,
)
from serving.manifest import DefaultOptions, LanguageTokens
from serving.preparation import Direction, TextPreparer
from serving.request import DecodingOptions, Outcome
from serving.scoring import ScoredTarget, TargetScorer, check_targets, scoring_options
from serving.translator import ScoreCommand, Translator
from tests.fakes import EOS_ID, UNKNOWN_ID, ByteTokenizer, FakeClock, ScriptedEngine, fake_limits, fake_preparer, hold

FAR_S = 1e9


def ids(text: str) -> tuple[int, ...]:
    return tuple(ByteTokenizer().encode(text))


def command(
    *pairs: tuple[str, str | Sequence[str]], source_language: str = "", target_language: str = "", deadline_s: float = FAR_S
) -> ScoreCommand:
    """Of texts with their targets, all of these text or all of them tokens."""
    return ScoreCommand(
        texts=[text for text, _ in pairs],
        targets=[target for _, target in pairs if isinstance(target, str)],
        target_tokens=[target for _, target in pairs if not isinstance(target, str)],
        source_language=source_language,
        target_language=target_language,
        deadline_s=deadline_s,
    )


# Targets to ids.


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        pytest.param("ab", ids("ab"), id="text"),
        pytest.param(["a", "b"], ids("ab"), id="tokens"),
        pytest.param("", (), id="empty text"),
        pytest.param(" \n", (), id="blank text"),
        pytest.param([], (), id="no tokens"),
        pytest.param(["a", f"<{UNKNOWN_ID}>"], (*ids("a"), UNKNOWN_ID), id="unknown text, as an answer spells it"),
        pytest.param("b" * 63, ids("b" * 63), id="the longest"),
    ],
)
def test_a_target_ends_in_the_end_of_sentence_token(target: str | list[str], expected: tuple[int, ...]) -> None:
    assert TargetScorer(preparer=fake_preparer()).target_ids(target, "targets[0]", 3) == (*expected, EOS_ID)


@pytest.mark.parametrize("target", ["", []], ids=["text", "tokens"])
def test_a_blank_target_of_a_blank_text_has_no_tokens_at_all(target: str | list[str]) -> None:
    assert TargetScorer(preparer=fake_preparer()).target_ids(target, "targets[0]", 0) == ()


class Unspelled(ByteTokenizer):
    """Its vocabulary does not spell the unknown token."""

    def target_pieces(self, ids: Sequence[int]) -> list[str]:
        return ["" for _ in ids]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        pytest.param("x\0", "holds characters that the model's target vocabulary does not have", id="unknown characters"),
        pytest.param("b" * 64, "has 65 tokens with the end-of-sentence token; at most 64", id="long text"),
        pytest.param(["b"] * 64, "has 65 tokens with the end-of-sentence token; at most 64", id="many tokens"),
        pytest.param("b" * 5000, "has 5000 characters", id="far too long a text"),
        pytest.param("\ud800", "lone surrogate", id="not text"),
        pytest.param(["a", "bc"], "'bc' is no token of text", id="no token"),
        pytest.param([""], "'' is no token of text", id="empty token"),
        pytest.param([f"<{EOS_ID}>"], "is no token of text", id="the end"),
    ],
)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), Unspelled()], ids=["plain", "unspelled"])
def test_a_target_that_cannot_be_is_refused(target: str | list[str], reason: str, tokenizer: ByteTokenizer) -> None:
    preparer = replace(fake_preparer(), tokenizer=tokenizer)
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        TargetScorer(preparer=preparer).target_ids(target, "targets[7]", 3)
    assert raised.value.field == "targets[7]"


def test_a_tokenizer_of_sources_alone_scores_tokens() -> None:
    class SourceOnly(ByteTokenizer):
        def encode_target(self, text: str) -> list[int] | None:
            raise ValueError("cuts sources only")

    scorer = TargetScorer(preparer=replace(fake_preparer(), tokenizer=SourceOnly()))
    with pytest.raises(InvalidRequestError, match=r"^targets\[0\]: cuts sources only"):
        scorer.target_ids("a", "targets[0]", 2)
    assert scorer.target_ids(["a"], "target_tokens[0]", 2) == (*ids("a"), EOS_ID)


@pytest.mark.parametrize("target", ["x", ["x"]], ids=["text", "tokens"])
def test_a_blank_text_has_no_target(target: str | list[str]) -> None:
    with pytest.raises(InvalidRequestError, match=r"^targets\[0\]: belongs to a blank text"):
        TargetScorer(preparer=fake_preparer()).target_ids(target, "targets[0]", 0)


@pytest.mark.parametrize(
    ("targets", "target_tokens", "message"),
    [
        ([], [], r"^targets: must be as many as texts, 2, not 0"),
        (["a"], [], r"^targets: must be as many as texts, 2, not 1"),
        (["a"] * 3, [], r"^targets: must be as many as texts, 2, not 3"),
        ([], [["a"]], r"^target_tokens: must be as many as texts, 2, not 1"),
        (["a"] * 2, [["a"]] * 2, r"^target_tokens: are instead of targets"),
    ],
    ids=["none", "few", "many", "few of tokens", "both"],
)
def test_there_is_a_target_for_each_text(targets: list[str], target_tokens: list[list[str]], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        check_targets(2, targets, target_tokens)


async def test_what_the_model_is_told_is_forced_and_its_default_options_do_not_hold(engine: ScriptedEngine) -> None:
    defaults = DefaultOptions(
        repetition_penalty=2.0, suppressed=[[5]], ends_when_cut=True, min_target_tokens=3, max_target_tokens=4
    )
    preparer = replace(fake_preparer(), defaults=defaults)
    translator = Translator(preparer, engine, asyncio.get_running_loop())
    await translator.score(command(("a", "abcdef")))
    assert engine.submitted[0].options == scoring_options((*ids("abcdef"), EOS_ID))
    assert scoring_options((*ids("abcdef"), EOS_ID), Direction(before_target=(40, 41))) == DecodingOptions(
        length_penalty=0.0,
        max_target_tokens=9,
        return_token_scores=True,
        target_prefix=(40, 41),
        hidden_prefix_tokens=2,
        given_target=(*ids("abcdef"), EOS_ID),
    )


# The whole way.


async def test_targets_are_scored_in_the_order_of_their_texts(translator: Translator, engine: ScriptedEngine) -> None:
    first, blank, last = await translator.score(command(("abc", "xy"), (" ", ""), ("a", "")))
    assert (first.tokens, first.log_probs, first.log_prob) == (("x", "y", f"<{EOS_ID}>"), (-0.25, -0.5, -0.75), -1.5)
    assert (first.source_tokens, first.timings.steps, first.timings.queue_s) == (4, 3, 0.25)
    assert blank == ScoredTarget()
    assert (last.tokens, last.log_probs) == ((f"<{EOS_ID}>",), (-0.25,))
    assert [(one.source_ids, one.options.given_target, one.num_rows) for one in engine.submitted] == [
        ((*ids("abc"), EOS_ID), (*ids("xy"), EOS_ID), 1),
        ((*ids("a"), EOS_ID), (EOS_ID,), 1),
    ]
    assert {one.expires_at_s for one in engine.submitted} == {FAR_S}


async def test_tokens_are_scored_like_the_text_they_spell(translator: Translator) -> None:
    assert await translator.score(command(("abc", ["x", "y"]))) == await translator.score(command(("abc", "xy")))


async def test_only_blank_texts_never_reach_the_engine(translator: Translator, engine: ScriptedEngine) -> None:
    engine.refusal = OverloadedError("queue_full", 1.0)
    assert await translator.score(command(("", ""), (" ", " "))) == [ScoredTarget()] * 2


async def test_languages_are_told_and_not_scored(engine: ScriptedEngine) -> None:
    told = LanguageTokens(tokens={"en": 3, "de": 4}, before_source="source", before_target=True)
    preparer = TextPreparer(tokenizer=ByteTokenizer(), eos_id=EOS_ID, languages=(), language_tokens=told, limits=fake_limits())
    translator = Translator(preparer, engine, asyncio.get_running_loop())
    (scored,) = await translator.score(command(("a", "b"), source_language="en", target_language="de"))
    (sequence,) = engine.submitted
    assert sequence.source_ids == (3, *ids("a"), EOS_ID)
    assert (sequence.options.target_prefix, sequence.options.given_target) == ((4,), (*ids("b"), EOS_ID))
    assert len(scored.tokens) == 2
    with pytest.raises(InvalidRequestError, match=r"^target_language: has to be set"):
        await translator.score(command(("a", "b"), source_language="en"))


@pytest.mark.parametrize(
    ("asked", "field", "reason"),
    [
        pytest.param(command(), "texts", "must not be empty", id="no texts"),
        pytest.param(command(*[("a", "b")] * 5), "texts", "at most 4 in a request, not 5", id="too many texts"),
        pytest.param(ScoreCommand(texts=["a", "b"], targets=["c"], deadline_s=FAR_S), "targets", "2, not 1", id="few targets"),
        pytest.param(command(("a", "b"), ("b" * 32, "c")), "texts[1]", "has 33 tokens .* at most 32", id="long text"),
        pytest.param(command(("a", "b"), ("a", "b" * 64)), "targets[1]", "has 65 tokens .* at most 64", id="long target"),
        pytest.param(command(("a", ["b"]), ("a", ["bc"])), "target_tokens[1]", "'bc' is no token", id="unknown token"),
        pytest.param(command(("a", "b"), (" ", "b")), "targets[1]", "a blank text", id="target of a blank text"),
        pytest.param(command(("a", "b"), source_language="xx"), "source_language", "not from 'xx'", id="source language"),
        pytest.param(command(("a", "b"), target_language="xx"), "target_language", "not into 'xx'", id="target language"),
    ],
)
async def test_what_is_out_of_bounds_is_refused_by_its_name(
    translator: Translator, engine: ScriptedEngine, asked: ScoreCommand, field: str, reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as raised:
        await translator.score(asked)
    assert raised.value.field == field
    assert engine.submitted == []


async def test_an_answer_that_could_become_too_large_is_refused(engine: ScriptedEngine) -> None:
    limits = fake_limits(max_texts_per_request=20_000)
    translator = Translator(fake_preparer(limits), engine, asyncio.get_running_loop())
    with pytest.raises(InvalidRequestError, match=r"over 131072 tokens together") as raised:
        await translator.score(command(*[("a", "b" * 62)] * 2081))
    assert raised.value.field == "targets"
    assert engine.submitted == []


@pytest.mark.parametrize(
    "refusal", [OverloadedError("queue_full", 0.5), ShuttingDownError("the server is shutting down")], ids=["full", "draining"]
)
async def test_a_refusal_of_the_engine_is_passed_on(translator: Translator, engine: ScriptedEngine, refusal: Exception) -> None:
    engine.refusal = refusal
    with pytest.raises(type(refusal)) as raised:
        await translator.score(command(("a", "b")))
    assert raised.value is refusal


async def test_a_deadline_that_is_over_admits_nothing(engine: ScriptedEngine) -> None:
    translator = Translator(fake_preparer(), engine, asyncio.get_running_loop(), clock=FakeClock(500.0))
    with pytest.raises(DeadlineExceededError, match="before the request was admitted"):
        await translator.score(command(("a", "b"), deadline_s=500.0))
    assert engine.submitted == []


async def test_when_one_target_fails_the_others_are_dropped(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    task = asyncio.create_task(translator.score(command(("a", "b"), ("c", "d"))))
    first, second = await asyncio.to_thread(engine.wait_running, 2)
    engine.end(second, Outcome(error=EngineError("a graph failed")))
    with pytest.raises(EngineError, match="a graph failed"):
        await task
    assert (first.cancelled, second.cancelled) == (True, False)


async def test_cancelling_the_task_drops_its_sequences(translator: Translator, engine: ScriptedEngine) -> None:
    engine.script = hold
    task = asyncio.create_task(translator.score(command(("a", "b"), ("c", "d"))))
    running = await asyncio.to_thread(engine.wait_running, 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(sequence.cancelled for sequence in running)
    await asyncio.to_thread(engine.wait_running, 0)
