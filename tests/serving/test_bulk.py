from __future__ import annotations

import io
import threading
from collections.abc import Iterable, Iterator

import pytest

from serving.bulk import Window, read_lines, through_engine, through_server, with_prefixes
from serving.errors import InvalidRequestError
from serving.request import Alternatives
from serving.request_options import RequestOptions
from tests.fakes import PATIENCE_S, ScriptedEngine, fake_preparer, hold, shouted


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


WINDOW = Window(max_sequences=4, max_source_tokens=1000)


def lines_through(engine: ScriptedEngine, lines: Iterable[str], window: Window = WINDOW) -> Iterator[str]:
    translations = through_engine(lines, preparer=fake_preparer(), engine=engine, options=RequestOptions(), window=window)
    return (translation.hypotheses[0].text for translation in translations)


@pytest.fixture
def started(engine: ScriptedEngine) -> Iterator[ScriptedEngine]:
    engine.start()
    yield engine
    engine.close()


def test_no_more_than_the_window_is_in_the_engine(started: ScriptedEngine) -> None:
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for number in range(100):
            read += 1
            assert number - len(answered) <= 5
            yield f"line {number}"

    answered: list[str] = []
    for text in lines_through(started, lines()):
        answered.append(text)
    assert answered == [f"LINE {number}" for number in range(100)]
    assert started.most_running <= 4
    assert read == 100


@pytest.mark.parametrize(
    ("window", "expected"),
    [(Window(max_sequences=2, max_source_tokens=1000), 2), (Window(max_sequences=9, max_source_tokens=13), 3)],
    ids=["sequences", "tokens"],
)
def test_the_window_is_filled_before_anything_is_waited_for(started: ScriptedEngine, window: Window, expected: int) -> None:
    started.script = hold
    answered: list[str] = []
    reader = threading.Thread(target=lambda: answered.extend(lines_through(started, iter(["abc"] * 6), window)))
    reader.start()
    running = started.wait_running(expected)
    started.script = shouted
    for sequence in running:
        started.end(sequence)
    reader.join(PATIENCE_S)
    assert answered == ["ABC"] * 6
    assert started.most_running == expected


def test_a_text_larger_than_the_window_goes_alone(started: ScriptedEngine) -> None:
    window = Window(max_sequences=4, max_source_tokens=3)
    assert list(lines_through(started, ["a", "a longer line", "b"], window)) == ["A", "A LONGER LINE", "B"]
    assert started.most_running == 1


def test_leaving_early_cancels_what_is_on_the_way(started: ScriptedEngine) -> None:
    started.script = lambda sequence: shouted(sequence) if sequence.source_ids[0] == 107 else None
    translations = lines_through(started, iter(["a", "b", "c", "d", "e", "f"]))
    assert next(translations) == "A"
    translations.close()  # type: ignore[attr-defined]  # a generator
    del translations
    started.wait_for(lambda: not started.running)


def test_several_translations_of_a_line_are_refused(started: ScriptedEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"^options\.alternatives: several translations"):
        next(
            through_engine(
                ["a"],
                preparer=fake_preparer(),
                engine=started,
                options=RequestOptions(alternatives=Alternatives()),
                window=WINDOW,
            )
        )
    assert started.submitted == []


def test_read_lines_reads_no_further_than_it_is_asked() -> None:
    stream = io.BytesIO(b"a\nb\n\xff\n")
    lines = read_lines(stream)
    assert [next(lines), next(lines)] == ["a", "b"]
    with pytest.raises(InvalidRequestError, match=r"^line 3: is not UTF-8 \(its byte 1\)$"):
        next(lines)


def test_requests_are_answered_in_order_whichever_ends_first() -> None:
    second_done = threading.Event()

    def translate(texts: list[str]) -> list[str]:
        if texts[0] == "a":
            assert second_done.wait(PATIENCE_S)
        else:
            second_done.set()
        return [text.upper() for text in texts]

    answers = through_server(iter("abcde"), translate, lines_per_request=2, requests_in_flight=2)
    assert list(answers) == ["A", "B", "C", "D", "E"]


def test_an_error_of_the_request_as_a_whole_keeps_its_name() -> None:
    def translate(texts: list[str]) -> list[str]:
        raise InvalidRequestError("options.beam_size", "must be 1")

    with pytest.raises(InvalidRequestError, match=r"^options\.beam_size: must be 1$"):
        list(through_server(iter("ab"), translate, lines_per_request=1, requests_in_flight=1))


def test_lines_and_prefixes_go_together() -> None:
    assert list(with_prefixes(["a", "b"], None)) == [("a", ""), ("b", "")]
    assert list(with_prefixes(["a", "b"], ["x", ""])) == [("a", "x"), ("b", "")]
    few = with_prefixes(["a", "b"], ["x"])
    assert next(few) == ("a", "x")
    with pytest.raises(InvalidRequestError, match="line 2: has no target prefix: there are 1"):
        next(few)
    many = with_prefixes(["a"], ["x", ""])
    assert next(many) == ("a", "x")
    with pytest.raises(InvalidRequestError, match="target prefixes: must be as many as lines, 1, not more"):
        next(many)
