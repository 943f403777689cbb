from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from serving.errors import InvalidRequestError, ModelLoadingError
from serving.pb import translation_pb2 as pb
from serving.request import FinishReason, Hypothesis, Outcome, PrefixBias
from serving.request_options import RequestOptions
from serving.servicer import _FINISH_REASONS, SERVICE_NAME, TranslationServicer, _known_options
from serving.translator import Translator
from tests.fakes import UNKNOWN_ID, ByteTokenizer, FakeClock, ScriptedEngine, fake_model

NOW_S = 1000.0


class Call:
    """What a handler asks of its call: how much time is left by the wall clock, None without a deadline."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine()
    yield engine
    engine.close()


@pytest.fixture
async def servicer(engine: ScriptedEngine) -> TranslationServicer:
    clock = FakeClock(NOW_S)
    model = fake_model(engine)
    servicer = TranslationServicer(clock=clock)
    servicer.serve(Translator(model.preparer, engine, asyncio.get_running_loop(), clock=clock), model.description)
    return servicer


async def translate(servicer: TranslationServicer, request: pb.TranslateRequest, call: Any = None) -> pb.TranslateResponse:
    return await servicer.Translate(request, call or Call())  # type: ignore[arg-type]  # a fake


async def test_a_response_holds_all_that_is_known(servicer: TranslationServicer) -> None:
    options = pb.DecodingOptions(beam_size=2, num_hypotheses=2, max_target_tokens=3, return_scores=True)
    response = await translate(servicer, pb.TranslateRequest(texts=["ab", ""], options=options))
    shouted, blank = response.translations
    assert [(h.text, h.score, h.target_tokens) for h in shouted.hypotheses] == [("AB", -0.5, 3), ("AB!", -1.5, 3)]
    assert [h.finish_reason for h in shouted.hypotheses] == [pb.FINISH_REASON_EOS, pb.FINISH_REASON_LENGTH]
    assert shouted.source_tokens == 3
    assert shouted.timings == pb.TextTimings(
        queue_seconds=0.25, encode_seconds=0.5, decode_seconds=1.0, steps=7, mean_rows_per_step=3.5
    )
    assert [(h.text, h.score, h.finish_reason) for h in blank.hypotheses] == [("", 0.0, pb.FINISH_REASON_EOS)]
    assert (response.timings.queue_seconds, response.timings.encode_seconds, response.timings.decode_seconds) == (0.25, 0.5, 1.0)


def test_every_finish_reason_has_its_number() -> None:
    assert set(_FINISH_REASONS) == set(FinishReason)
    assert pb.FINISH_REASON_UNSPECIFIED not in _FINISH_REASONS.values()


async def test_options_that_are_not_set_are_left_to_the_defaults(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    await translate(servicer, pb.TranslateRequest(texts=["ab"]))
    options = engine.submitted[0].options
    assert (options.beam_size, options.num_hypotheses, options.length_penalty, options.min_target_tokens) == (1, 1, 1.0, 0)


async def test_an_option_set_to_zero_is_not_an_option_left_out(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    await translate(servicer, pb.TranslateRequest(texts=["ab"], options=pb.DecodingOptions(length_penalty=0)))
    assert engine.submitted[0].options.length_penalty == 0
    with pytest.raises(InvalidRequestError, match=r"options.beam_size: must be from 1 to 5, not 0"):
        await translate(servicer, pb.TranslateRequest(texts=["ab"], options=pb.DecodingOptions(beam_size=0)))


@pytest.mark.parametrize(("field", "value"), [("source_language", "xx"), ("target_language", "xx")], ids=["source", "target"])
async def test_languages_are_checked(servicer: TranslationServicer, field: str, value: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        await translate(servicer, pb.TranslateRequest(texts=["a"], **{field: value}))  # type: ignore[arg-type]  # both are strings
    with pytest.raises(InvalidRequestError, match=f"^{field}: "):
        await anext(servicer.TranslateStream(pb.TranslateStreamRequest(text="a", **{field: value}), Call()))  # type: ignore[arg-type]  # a fake


@pytest.mark.parametrize(
    ("remaining_s", "expected_s"),
    [
        pytest.param(2.5, NOW_S + 2.5, id="the client's"),
        pytest.param(None, NOW_S + 60, id="a Python client's timeout=0 arrives as none"),
        pytest.param(1e12, NOW_S + 60, id="further than the server allows"),
    ],
)
async def test_a_deadline_is_monotonic_and_never_beyond_the_servers(
    servicer: TranslationServicer, engine: ScriptedEngine, remaining_s: float | None, expected_s: float
) -> None:
    await translate(servicer, pb.TranslateRequest(texts=["a"]), Call(remaining_s))
    async for _ in servicer.TranslateStream(pb.TranslateStreamRequest(text="a"), Call(remaining_s)):  # type: ignore[arg-type]  # a fake
        pass
    assert [sequence.expires_at_s for sequence in engine.submitted] == [expected_s, expected_s]


async def test_a_stream_ends_with_the_translation(servicer: TranslationServicer) -> None:
    stream = servicer.TranslateStream(pb.TranslateStreamRequest(text="grün"), Call())  # type: ignore[arg-type]  # a fake
    responses = [response async for response in stream]
    assert "".join(response.text_delta for response in responses) == "GRÜN"
    assert [response.HasField("translation") for response in responses] == [False] * (len(responses) - 1) + [True]
    assert responses[-1].translation.hypotheses[0].text == "GRÜN"


async def score(servicer: TranslationServicer, request: pb.ScoreRequest, call: Any = None) -> pb.ScoreResponse:
    return await servicer.Score(request, call or Call())  # type: ignore[arg-type]  # a fake


async def test_scores_hold_all_that_is_known(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    request = pb.ScoreRequest(texts=["ab", ""], targets=["x", ""], source_language="en", target_language="fr")
    response = await score(servicer, request, Call(2.5))
    scored, blank = response.scores
    assert scored == pb.TargetScore(
        tokens=["x", "<1>"],
        log_probs=[-0.25, -0.5],
        log_prob=-0.75,
        source_tokens=3,
        timings=pb.TextTimings(queue_seconds=0.25, encode_seconds=0.5, decode_seconds=1.0, steps=2, mean_rows_per_step=3.5),
    )
    assert blank == pb.TargetScore(timings=pb.TextTimings())
    assert (response.timings.queue_seconds, response.timings.encode_seconds, response.timings.decode_seconds) == (0.25, 0.5, 1.0)
    assert [sequence.expires_at_s for sequence in engine.submitted] == [NOW_S + 2.5]


async def test_targets_may_come_as_tokens(servicer: TranslationServicer) -> None:
    tokens = [pb.TokenSequence(tokens=["x", "y"]), pb.TokenSequence()]
    response = await score(servicer, pb.ScoreRequest(texts=["a", "b"], target_tokens=tokens))
    assert [list(scored.tokens) for scored in response.scores] == [["x", "y", "<1>"], ["<1>"]]
    with pytest.raises(InvalidRequestError, match=r"^target_tokens\[1\]: 'xy' is no token of text"):
        await score(servicer, pb.ScoreRequest(texts=["a", "b"], target_tokens=[*tokens[1:], pb.TokenSequence(tokens=["xy"])]))


async def test_model_information(servicer: TranslationServicer) -> None:
    info = await servicer.GetModelInfo(pb.GetModelInfoRequest(), Call())  # type: ignore[arg-type]  # a fake
    assert (info.model_name, info.model_version, info.server_version) == ("shout", "0123abcd", "1.2.3")
    assert [(pair.source, pair.target) for pair in info.languages] == [("en", "de"), ("en", "fr"), ("de", "en")]
    assert (info.precision, info.device) == ("fp32", "cpu")
    assert info.limits == pb.Limits(
        max_texts_per_request=4, max_source_tokens=32, max_target_tokens=64, max_beam_size=5, max_request_seconds=60
    )
    defaults = info.default_options
    assert (defaults.beam_size, defaults.num_hypotheses, defaults.length_penalty, defaults.min_target_tokens) == (1, 1, 1.0, 0)
    assert defaults.HasField("min_target_tokens")
    # How a request names the model's own end.
    assert list(defaults.end_tokens) == ["<1>"]
    assert not defaults.HasField("max_target_tokens")


@pytest.mark.parametrize("method", ["Translate", "Score", "GetModelInfo"])
async def test_before_the_model_is_there_it_says_so(method: str) -> None:
    requests: dict[str, Any] = {
        "Translate": pb.TranslateRequest(texts=["a"]),
        "Score": pb.ScoreRequest(texts=["a"], targets=["b"]),
        "GetModelInfo": pb.GetModelInfoRequest(),
    }
    with pytest.raises(ModelLoadingError, match="still loading"):
        await getattr(TranslationServicer(), method)(requests[method], Call())
    with pytest.raises(ModelLoadingError, match="still loading"):
        await anext(TranslationServicer().TranslateStream(pb.TranslateStreamRequest(text="a"), Call()))  # type: ignore[arg-type]  # a fake


def test_every_method_of_the_protocol_is_there() -> None:
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["Translation"].methods]
    assert SERVICE_NAME == "onnxlate.v1.Translation"
    assert all(method in vars(TranslationServicer) for method in methods)


async def test_numbers_pass_unrounded(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    # A server must not answer otherwise than the same model in the same process, so the protocol must not round.
    score = -1.8624624999999999
    engine.script = lambda sequence: Outcome(
        hypotheses=(Hypothesis(target_ids=(), score=score, finish_reason=FinishReason.EOS, target_tokens=1),)
    )
    request = pb.TranslateRequest(texts=["a"], options=pb.DecodingOptions(length_penalty=0.6, return_scores=True))
    assert (await translate(servicer, request)).translations[0].hypotheses[0].score == score
    assert engine.submitted[0].options.length_penalty == 0.6


async def test_scores_are_left_unset_where_nobody_asked(servicer: TranslationServicer) -> None:
    response = await translate(servicer, pb.TranslateRequest(texts=["ab", ""]))
    assert [h.HasField("score") for translation in response.translations for h in translation.hypotheses] == [False, False]


async def test_pieces_and_attention_are_sent_where_somebody_asked(servicer: TranslationServicer) -> None:
    asked = pb.DecodingOptions(return_attention=True)
    (translation,) = (await translate(servicer, pb.TranslateRequest(texts=["ab"], options=asked))).translations
    assert list(translation.source_pieces) == ["a", "b"]
    (hypothesis,) = translation.hypotheses
    assert list(hypothesis.target_pieces) == ["A", "B"]
    assert list(hypothesis.attention) == [1.0, 0.0, 0.25, 0.75]
    (plain,) = (await translate(servicer, pb.TranslateRequest(texts=["ab"]))).translations
    assert not plain.source_pieces
    assert not plain.hypotheses[0].target_pieces
    assert not plain.hypotheses[0].attention


async def test_scores_of_tokens_are_sent_with_their_pieces_where_somebody_asked(servicer: TranslationServicer) -> None:
    asked = pb.DecodingOptions(return_token_scores=True)
    (translation,) = (await translate(servicer, pb.TranslateRequest(texts=["ab"], options=asked))).translations
    (hypothesis,) = translation.hypotheses
    assert list(hypothesis.target_pieces) == ["A", "B"]
    assert list(hypothesis.token_scores) == [-0.25, -0.5, -0.75]
    assert not hypothesis.attention
    (plain,) = (await translate(servicer, pb.TranslateRequest(texts=["ab"]))).translations
    assert not plain.hypotheses[0].token_scores


async def test_alternatives_and_the_coverage_penalty_reach_the_engine(
    servicer: TranslationServicer, engine: ScriptedEngine
) -> None:
    asked = pb.DecodingOptions(num_hypotheses=2, alternatives=pb.Alternatives(min_probability=0.0), coverage_penalty=0.5)
    (translation,) = (await translate(servicer, pb.TranslateRequest(texts=["ab"], options=asked))).translations
    assert len(translation.hypotheses) == 2
    assert [sequence.options.coverage_penalty for sequence in engine.submitted] == [0.0, 0.5, 0.5]
    assert [sequence.options.beam_size for sequence in engine.submitted] == [2, 1, 1]


def test_every_option_of_the_protocol_is_an_option_of_ours() -> None:
    ours = set(RequestOptions.__dataclass_fields__)
    assert ours == {field.name for field in pb.DecodingOptions.DESCRIPTOR.fields}


async def test_options_that_come_again_are_the_same_and_others_are_others(
    servicer: TranslationServicer, engine: ScriptedEngine
) -> None:
    long = pb.DecodingOptions(suppressed_texts=["a" * 300])
    _known_options.cache_clear()
    for _ in range(2):
        for options, longest in (
            (pb.DecodingOptions(max_target_tokens=3), 3),
            (pb.DecodingOptions(max_target_tokens=4), 4),
            (pb.DecodingOptions(), 38),
        ):
            await translate(servicer, pb.TranslateRequest(texts=["ab"], options=options))
            assert engine.submitted[-1].options.max_target_tokens == longest
        with pytest.raises(InvalidRequestError, match=r"^options\.suppressed_texts\[0\]"):
            await translate(servicer, pb.TranslateRequest(texts=["ab"], options=long))
    known = _known_options.cache_info()
    assert (known.misses, known.hits) == (3, 3), "long options are remembered, or short ones are not"


async def test_what_is_asked_of_targets_reaches_the_engine(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    options = pb.DecodingOptions(
        prefix_bias=0.25,
        suppressed_texts=["x"],
        suppressed_sequences=[pb.TokenSequence(tokens=["y", "z"])],
        suppress_unknown=True,
        min_target_ratio=0.5,
        max_target_ratio=3,
        end_tokens=["."],
        return_end_token=True,
        max_source_tokens=3,
    )
    await translate(servicer, pb.TranslateRequest(texts=["abc", "d"], target_prefixes=["ab", ""], options=options))
    encode = ByteTokenizer().encode
    first, second = (sequence.options for sequence in engine.submitted)
    assert first.prefix_bias == PrefixBias(tokens=tuple(encode("ab")), strength=0.25)
    assert second.prefix_bias is None
    assert first.suppressed == ((UNKNOWN_ID,), tuple(encode("x")), tuple(encode(" x")), tuple(encode("yz")))
    assert len(engine.submitted[0].source_ids) == 3
    assert (first.min_target_tokens, first.max_target_tokens) == (2, 9)
    assert (first.end_ids, first.return_end_token) == (tuple(encode(".")), True)


async def test_a_stream_has_its_prefix(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    async for _ in servicer.TranslateStream(pb.TranslateStreamRequest(text="a", target_prefix="b"), Call()):  # type: ignore[arg-type]  # a fake
        pass
    assert engine.submitted[0].options.target_prefix == tuple(ByteTokenizer().encode("b"))


async def test_a_prefix_that_cannot_be_is_named(servicer: TranslationServicer, engine: ScriptedEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"^target_prefixes\[1\]: "):
        await translate(servicer, pb.TranslateRequest(texts=["a", "b"], target_prefixes=["", "a" * 64]))
    with pytest.raises(InvalidRequestError, match=r"^target_prefixes: must be as many as texts, 2, or none at all, not 1"):
        await translate(servicer, pb.TranslateRequest(texts=["a", "b"], target_prefixes=["c"]))
    assert engine.submitted == []
