"""The served comparison's peer: how it calls CTranslate2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serving.request_options import RequestOptions
from tests.fakes import fake_limits, fake_preparer

pytest.importorskip("mosec", reason="mosec is not installed; make bench does it")
mosec_app: Any = pytest.importorskip(
    "benchmarks.served.mosec_app", reason="ctranslate2 is not installed; make test-peers does it"
)


class FakeTranslator:
    """Answers every source with itself, and keeps how it was called."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}

    def translate_batch(self, sources: list[list[str]], **options: Any) -> list[Any]:
        self.options = options
        return [SimpleNamespace(hypotheses=[source[:-1]]) for source in sources]


class WordTokenizer:
    """A piece a word."""

    def encode(self, texts: list[str], out_type: type) -> list[list[str]]:
        return [text.split() for text in texts]

    def decode(self, pieces: list[str]) -> str:
        return " ".join(pieces)


@pytest.mark.parametrize("length", [1, 7, 100])
def test_a_target_is_cut_where_our_server_cuts_it(length: int) -> None:
    ours = fake_preparer(fake_limits(max_target_tokens=1000)).decoding_options(RequestOptions(), length).max_target_tokens
    assert mosec_app.longest_target(["a"] * length) == ours


def test_a_batch_has_the_limit_of_its_longest_source() -> None:
    worker = mosec_app.Translator.__new__(mosec_app.Translator)
    translator = worker._translator = FakeTranslator()
    worker._source = worker._target = WordTokenizer()
    worker._beam_size = 4
    assert worker.forward(["a", "a b c"]) == [{"text": "a"}, {"text": "a b c"}]
    # Three pieces and the end of the sentence.
    assert translator.options == {"beam_size": 4, "max_decoding_length": 2 * 4 + 32}
    assert worker.forward("a b") == {"text": "a b"}
    assert translator.options["max_decoding_length"] == 2 * 3 + 32
