from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from serving.client import RetryPolicy, TranslationClient
from serving.errors import (
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    OverloadedError,
    RemoteError,
    RequestCancelledError,
    ShuttingDownError,
)
from serving.metrics import ServiceMetrics
from serving.model import ServedModel
from serving.request import Alternatives, Outcome, PrefixBias
from tests.fakes import EOS_ID, PATIENCE_S, UNKNOWN_ID, ByteTokenizer, ScriptedEngine, fake_model, hold
from tests.servers import LOCAL, Running, running_server


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def server(engine: ScriptedEngine) -> Iterator[Running]:
    with running_server(engine) as server:
        yield server


class Sleeper:
    """Sleeps not at all, and remembers for how long; may do something instead."""

    def __init__(self) -> None:
        self.slept_s: list[float] = []
        self.instead: Callable[[], None] = lambda: None

    def __call__(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.instead()


@pytest.fixture
def sleeper() -> Sleeper:
    return Sleeper()


@pytest.fixture
def client(server: Running, sleeper: Sleeper) -> Iterator[TranslationClient]:
    retry = RetryPolicy(max_attempts=3, first_backoff_s=0.5)
    with TranslationClient(server.address, timeout_s=PATIENCE_S, retry=retry, sleep=sleeper, draw=lambda: 1.0) as client:
        yield client


@pytest.fixture
def dead_address() -> Iterator[str]:
    """Where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it; not listening
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_translations_come_in_order_with_all_they_hold(client: TranslationClient) -> None:
    first, second = client.translate(["ab", "c"], beam_size=2, num_hypotheses=2, max_target_tokens=3, return_scores=True)
    assert (first.text, second.text, first.source_tokens) == ("AB", "C", 3)
    assert [(h.text, h.score, h.finish_reason, h.target_tokens) for h in first.hypotheses] == [
        ("AB", -0.5, "eos", 3),
        ("AB!", -1.5, "length", 3),
    ]
    assert (first.timings.queue_s, first.timings.steps, first.timings.mean_rows_per_step) == (0.25, 7, 3.5)


def test_attention_comes_in_rows(client: TranslationClient) -> None:
    asked, blank = client.translate(["ab", " "], return_attention=True)
    assert asked.source_pieces == ("a", "b")
    (hypothesis,) = asked.hypotheses
    assert hypothesis.target_pieces == ("A", "B")
    assert hypothesis.attention == ((1.0, 0.0), (0.25, 0.75))
    assert hypothesis.alignment == ((0, 0), (1, 1))
    assert (blank.source_pieces, blank.hypotheses[0].attention, blank.hypotheses[0].alignment) == ((), (), ())
    (plain,) = client.translate(["ab"], replace_unknowns=True)
    assert (plain.source_pieces, plain.hypotheses[0].target_pieces, plain.hypotheses[0].attention) == ((), (), ())


def test_answers_are_frozen(client: TranslationClient) -> None:
    (translation,) = client.translate(["a"])
    assert translation.hypotheses[0].score is None, "nobody asked for it"
    with pytest.raises(dataclasses.FrozenInstanceError):
        translation.source_tokens = 1  # type: ignore[misc]  # that is what is tested


def test_options_reach_the_server(client: TranslationClient, engine: ScriptedEngine) -> None:
    client.translate(
        ["a"],
        source_language="en",
        target_language="fr",
        beam_size=3,
        length_penalty=0.5,
        min_target_tokens=2,
        max_target_tokens=9,
    )
    options = engine.submitted[0].options
    assert (options.beam_size, options.length_penalty, options.min_target_tokens, options.max_target_tokens) == (3, 0.5, 2, 9)


def test_what_is_asked_of_targets_reaches_the_server(client: TranslationClient, engine: ScriptedEngine) -> None:
    client.translate(
        ["abc", "b"],
        target_prefixes=["x", ""],
        prefix_bias=0.5,
        coverage_penalty=0.25,
        suppressed_texts=["y"],
        suppressed_sequences=[("y", "z")],
        suppress_unknown=True,
        max_target_ratio=2.0,
        end_tokens=["."],
        return_end_token=True,
        max_source_tokens=2,
    )
    encode = ByteTokenizer().encode
    first, second = (sequence.options for sequence in engine.submitted)
    assert first.prefix_bias == PrefixBias(tokens=tuple(encode("x")), strength=0.5)
    assert second.prefix_bias is None
    assert first.coverage_penalty == 0.25
    assert first.suppressed == ((UNKNOWN_ID,), tuple(encode("y")), tuple(encode(" y")), tuple(encode("yz")))
    assert (first.max_target_tokens, first.end_ids, first.return_end_token) == (4, tuple(encode(".")), True)
    assert len(engine.submitted[0].source_ids) == 2
    list(client.translate_stream("a", target_prefix="x"))
    assert engine.submitted[2].options.target_prefix == tuple(encode("x"))


def test_one_string_is_no_list_of_strings(client: TranslationClient, engine: ScriptedEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"^target_prefixes: must be strings, not one string"):
        client.translate(["a"], target_prefixes="x")
    with pytest.raises(InvalidRequestError, match=r"^options\.end_tokens: must be strings"):
        client.translate(["a"], end_tokens=".")
    with pytest.raises(InvalidRequestError, match=r"^options\.suppressed_texts: must be strings"):
        client.translate(["a"], suppressed_texts="bad")
    with pytest.raises(InvalidRequestError, match=r"^options\.suppressed_sequences\[1\]: must be strings"):
        client.translate(["a"], suppressed_sequences=[["a"], "bad"])
    assert engine.submitted == []


def test_alternatives_and_scores_of_tokens(client: TranslationClient, engine: ScriptedEngine) -> None:
    asked = Alternatives(min_probability=0.0)
    (translation,) = client.translate(["ab"], num_hypotheses=3, alternatives=asked, return_token_scores=True)
    assert len(translation.hypotheses) == 3
    assert translation.hypotheses[0].target_pieces == ("A", "B")
    # That of the alternative is its own.
    assert translation.hypotheses[0].token_scores == (-0.5, -0.5, -0.75)
    assert len(engine.submitted) == 4


def test_a_prefix_out_of_bounds_is_named(client: TranslationClient) -> None:
    with pytest.raises(InvalidRequestError, match=r"^target_prefixes\[1\]: has 4 tokens; must be shorter"):
        client.translate(["a", "b"], target_prefixes=["", "abcd"], max_target_tokens=4)
    with pytest.raises(InvalidRequestError, match=r"^target_prefix: has 4 tokens; must be shorter"):
        list(client.translate_stream("a", target_prefix="abcd", max_target_tokens=4))


def test_a_stream_tells_the_text_in_pieces(client: TranslationClient) -> None:
    pieces = list(client.translate_stream("grün", target_language="de", max_target_tokens=20))
    assert "".join(piece.text_delta for piece in pieces) == "GRÜN"
    assert pieces[-1].translation is not None
    assert pieces[-1].translation.text == "GRÜN"


def test_scores_of_targets(client: TranslationClient, engine: ScriptedEngine) -> None:
    first, second = client.score(["ab", "c"], ["xyz", ""], source_language="en", target_language="de")
    assert (first.tokens, first.log_probs) == (("x", "y", "z", "<1>"), (-0.25, -0.5, -0.75, -1.0))
    assert (first.log_prob, first.mean_log_prob, first.source_tokens, first.timings.steps) == (-2.5, -0.625, 3, 4)
    assert (second.tokens, second.mean_log_prob) == (("<1>",), -0.25)
    (by_tokens,) = client.score(["ab"], target_tokens=[first.tokens[:-1]])
    assert by_tokens == first
    (blank,) = client.score([""], [""])
    assert (blank.tokens, blank.log_prob, blank.mean_log_prob) == ((), 0.0, 0.0)
    assert len(engine.submitted) == 3


def test_targets_out_of_bounds_are_named(client: TranslationClient, engine: ScriptedEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"^targets: must be as many as texts, 2, not 1"):
        client.score(["a", "b"], ["c"])
    with pytest.raises(InvalidRequestError, match=r"^targets\[1\]: has 65 tokens"):
        client.score(["a", "b"], ["c", "d" * 64])
    with pytest.raises(InvalidRequestError, match=r"^targets: must be strings, not one string"):
        client.score(["a"], "b")
    with pytest.raises(InvalidRequestError, match=r"^target_tokens\[0\]: must be strings, not one string"):
        client.score(["a"], target_tokens=["b"])
    assert engine.submitted == []


def test_model_info(client: TranslationClient) -> None:
    info = client.model_info()
    assert (info.name, info.version, info.precision, info.device) == ("shout", "0123abcd", "fp32", "cpu")
    assert info.languages == (("en", "de"), ("en", "fr"), ("de", "en"))
    assert (info.max_texts_per_request, info.max_source_tokens, info.max_beam_size, info.max_request_s) == (4, 32, 5, 60.0)
    assert info.end_tokens == (f"<{EOS_ID}>",)


# Errors.


def test_an_invalid_request_names_its_field_and_is_not_tried_again(client: TranslationClient, sleeper: Sleeper) -> None:
    with pytest.raises(InvalidRequestError, match="must be from 1 to 5, not 9") as raised:
        client.translate(["a"], beam_size=9)
    assert raised.value.field == "options.beam_size"
    assert sleeper.slept_s == []


@pytest.mark.parametrize(("text", "beam_size"), [("\ud800", 1), ("a", 2**40)], ids=["not text", "a number beyond the field"])
def test_what_does_not_fit_a_message_is_an_invalid_request(client: TranslationClient, text: str, beam_size: int) -> None:
    with pytest.raises(InvalidRequestError, match=r"^request: "):
        client.translate([text], beam_size=beam_size)


def test_overload_is_answered_at_once_and_tried_again_when_the_server_says(
    client: TranslationClient, engine: ScriptedEngine, sleeper: Sleeper
) -> None:
    engine.refusal = OverloadedError("queue_full", 0.75)
    with pytest.raises(OverloadedError) as raised:
        client.translate(["a"])
    assert (raised.value.reason, raised.value.retry_after_s) == ("queue_full", 0.75)
    # The server's 0.75 s at least, then the backoff's 1 s.
    assert sleeper.slept_s == [0.75, 1.0]
    assert engine.submitted == []


def test_a_try_after_an_overload_succeeds(client: TranslationClient, engine: ScriptedEngine, sleeper: Sleeper) -> None:
    engine.refusal = OverloadedError("queue_full", 0.25)

    def make_room() -> None:
        engine.refusal = None

    sleeper.instead = make_room
    assert client.translate(["a"])[0].text == "A"
    assert len(sleeper.slept_s) == 1


def test_a_stream_is_tried_again_before_its_first_piece(
    client: TranslationClient, engine: ScriptedEngine, sleeper: Sleeper
) -> None:
    engine.refusal = OverloadedError("queue_full", 0.25)

    def make_room() -> None:
        engine.refusal = None

    sleeper.instead = make_room
    assert "".join(piece.text_delta for piece in client.translate_stream("ab")) == "AB"


def test_a_stream_is_not_tried_again_after_its_first_piece(
    client: TranslationClient, engine: ScriptedEngine, sleeper: Sleeper
) -> None:
    engine.script = hold
    stream = client.translate_stream("ab")
    seen: list[str] = []
    error: list[Exception] = []

    def read() -> None:
        try:
            seen.extend(piece.text_delta for piece in stream)
        except Exception as raised:  # whatever it is, it is looked at on the test's own thread
            error.append(raised)

    reader = threading.Thread(target=read)
    reader.start()
    (sequence,) = engine.wait_running(1)
    engine.emit(sequence, b"A")
    engine.end(sequence, Outcome(error=ShuttingDownError("bye")))
    reader.join(PATIENCE_S)
    assert seen in ([], ["A"])
    assert [type(raised) for raised in error] == [ShuttingDownError]
    assert len(engine.submitted) == (1 if seen else 3)


def test_a_wait_beyond_the_deadline_is_not_begun(server: Running, engine: ScriptedEngine, sleeper: Sleeper) -> None:
    engine.refusal = OverloadedError("queue_full", 60.0)
    with TranslationClient(server.address, timeout_s=PATIENCE_S, sleep=sleeper) as client, pytest.raises(OverloadedError):
        client.translate(["a"])
    assert sleeper.slept_s == []


def test_a_draining_server_says_so(client: TranslationClient, engine: ScriptedEngine, sleeper: Sleeper) -> None:
    engine.drain()
    with pytest.raises(ShuttingDownError, match="the server is shutting down"):
        client.translate(["a"])
    assert len(sleeper.slept_s) == 2


def test_a_call_that_takes_too_long_is_over(client: TranslationClient, engine: ScriptedEngine, sleeper: Sleeper) -> None:
    engine.script = hold
    with pytest.raises(DeadlineExceededError):
        client.translate(["a"], timeout_s=0.1)
    assert sleeper.slept_s == []
    engine.wait_for(lambda: len(engine.submitted) == 1 and not engine.running)


def test_a_server_that_fails_tells_no_more_than_an_id(
    client: TranslationClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = lambda _: Outcome(error=EngineError("/secret/path"))
    with pytest.raises(RemoteError, match=r"^INTERNAL: internal error [0-9a-f]{32}$") as raised:
        client.translate(["a"])
    assert raised.value.code == "INTERNAL"


def test_a_closed_stream_leaves_nothing_in_the_engine(client: TranslationClient, engine: ScriptedEngine) -> None:
    engine.script = hold
    streams = []
    for number in range(5):
        stream = client.translate_stream("ab")
        first = threading.Thread(target=next, args=(stream,))
        first.start()
        engine.emit(engine.wait_running(number + 1)[-1], b"A")
        first.join(PATIENCE_S)
        streams.append(stream)
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]  # a generator
    engine.wait_for(lambda: not engine.running)
    assert all(sequence.cancelled for sequence in engine.submitted)


def test_a_client_that_closes_cancels_what_is_in_flight(server: Running, engine: ScriptedEngine) -> None:
    engine.script = hold
    errors: list[BaseException] = []

    def call(client: TranslationClient) -> None:
        try:
            client.translate(["a"])
        except RequestCancelledError as error:
            errors.append(error)

    client = TranslationClient(server.address, timeout_s=PATIENCE_S)
    caller = threading.Thread(target=call, args=(client,))
    caller.start()
    engine.wait_running(1)
    client.close()
    caller.join(PATIENCE_S)
    assert len(errors) == 1
    engine.wait_for(lambda: not engine.running)


def test_where_nobody_listens_it_tries_and_says_so(dead_address: str, sleeper: Sleeper) -> None:
    retry = RetryPolicy(max_attempts=3)
    with (
        TranslationClient(dead_address, retry=retry, sleep=sleeper) as client,
        pytest.raises(RemoteError, match="UNAVAILABLE") as raised,
    ):
        client.translate(["a"])
    assert raised.value.code == "UNAVAILABLE"
    assert len(sleeper.slept_s) == 2


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
def test_a_timeout_that_grpc_would_take_for_none_is_refused(client: TranslationClient, timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        TranslationClient("127.0.0.1:1", timeout_s=timeout_s)
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        client.translate(["a"], timeout_s=timeout_s)


def test_a_message_that_is_too_large_is_not_tried_again(client: TranslationClient, sleeper: Sleeper) -> None:
    with pytest.raises(RemoteError, match="RESOURCE_EXHAUSTED") as raised:
        client.translate(["a" * (5 << 20)])
    assert raised.value.code == "RESOURCE_EXHAUSTED"
    assert sleeper.slept_s == []


@pytest.mark.parametrize(
    ("attempts", "draw", "expected_s"), [(1, 1.0, 0.1), (2, 1.0, 0.2), (3, 0.5, 0.2), (20, 1.0, 5.0), (7, 0.0, 0.0)]
)
def test_backoff_doubles_is_bounded_and_drawn_from_all_of_it(attempts: int, draw: float, expected_s: float) -> None:
    assert RetryPolicy().wait_s(attempts, draw) == pytest.approx(expected_s)


# Readiness.


def test_wait_ready_gives_up_in_time(dead_address: str) -> None:
    with TranslationClient(dead_address) as client, pytest.raises(DeadlineExceededError, match=r"was not ready within 0\.2 s"):
        client.wait_ready(0.2)


def test_a_server_of_another_kind_is_reported() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with TranslationClient(f"127.0.0.1:{port}") as client:
            with pytest.raises(RemoteError, match="UNIMPLEMENTED"):
                client.wait_ready(PATIENCE_S)
            with pytest.raises(RemoteError, match="UNIMPLEMENTED"):
                client.translate(["a"])
    finally:
        other.stop(None).wait()


def test_a_request_is_refused_while_the_model_loads_and_served_after(engine: ScriptedEngine, sleeper: Sleeper) -> None:
    loading, may_load = threading.Event(), threading.Event()

    def load(_: ServiceMetrics) -> ServedModel:
        loading.set()
        assert may_load.wait(PATIENCE_S)
        return fake_model(engine)

    with running_server(load=load, config=LOCAL, wait=False) as server:
        assert loading.wait(PATIENCE_S)
        retry = RetryPolicy(max_attempts=2)
        with TranslationClient(server.address, timeout_s=PATIENCE_S, retry=retry, sleep=sleeper) as client:
            with pytest.raises(RemoteError, match="UNAVAILABLE: the model is still loading"):
                client.translate(["a"])
            assert sleeper.slept_s[0] >= 1.0
            may_load.set()
            client.wait_ready(PATIENCE_S)
            assert client.translate(["a"])[0].text == "A"
