"""The whole way with nothing faked: checkpoint, export, server, socket, client. The model is tiny and random."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from serving.bundle import Bundle
from serving.client import RemoteTranslation, TranslationClient
from serving.errors import DeadlineExceededError, InvalidRequestError
from serving.tokenizers import Tokenizer, load_tokenizer
from tests.fakes import PATIENCE_S
from tests.support import ENGLISH_LINES, tiny_sentencepiece

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "serving.cli"]
# Starting it loads a model, on a machine that may be busy.
START_S = 120.0


@dataclass(frozen=True, slots=True)
class Served:
    address: str
    metrics_url: str


def start(bundle: Bundle) -> subprocess.Popen[str]:
    command = [*COMMAND, "serve", str(bundle.directory), "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    return subprocess.Popen([*command, "--threads", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def ready(process: subprocess.Popen[str]) -> Served:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.match(r"serving tiny on (\S+), metrics on (\S+)$", line):
            return Served(found[1], f"http://{found[2]}/metrics")
    raise AssertionError("it ended without serving")


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle) -> Iterator[Served]:
    process = start(tiny_bundle)
    try:
        address = ready(process)
        # What it logs from now on has to go somewhere.
        threading.Thread(target=lambda: list(process.stderr or []), daemon=True).start()
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@pytest.fixture
def client(served: Served) -> Iterator[TranslationClient]:
    with TranslationClient(served.address, timeout_s=START_S) as client:
        yield client


def answers(translations: list[RemoteTranslation]) -> list[list[tuple[str, float | None]]]:
    return [[(h.text, h.score) for h in translation.hypotheses] for translation in translations]


def metric(served: Served, name: str) -> float:
    with urllib.request.urlopen(served.metrics_url, timeout=PATIENCE_S) as page:
        values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.MULTILINE)
    assert values, name
    return sum(map(float, values))


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_server_answers_what_the_bundle_answers_offline(served: Served, tiny_bundle: Bundle, beam_size: int) -> None:
    lines = "".join(f"{line}\n" for line in (*ENGLISH_LINES, "", "a"))
    options = ["--beam-size", str(beam_size), "--num-hypotheses", str(beam_size), "--max-target-tokens", "20"]
    said = []
    by_server = ["--server", served.address, "--batch-size", "3"]
    by_bundle = ["--bundle", str(tiny_bundle.directory), "--batch-size", "5"]
    for where in (by_server, by_bundle):
        command = [*COMMAND, "translate", *where, *options]
        result = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=START_S)
        assert (result.returncode, result.stderr) == (0, "")
        said.append(result.stdout)
    assert said[0] == said[1]
    assert said[0].count("\n") >= len(ENGLISH_LINES) * beam_size


def test_many_clients_with_their_own_options_get_what_each_gets_alone(client: TranslationClient) -> None:
    asked = [
        (line, beam_size, length_penalty)
        for number, line in enumerate(ENGLISH_LINES)
        for beam_size, length_penalty in [(1 + number % 5, 0.5 + number % 3)]
    ]

    def translate(request: tuple[str, int, float]) -> list[list[tuple[str, float | None]]]:
        text, beam_size, length_penalty = request
        return answers(
            client.translate(
                [text],
                beam_size=beam_size,
                num_hypotheses=beam_size,
                length_penalty=length_penalty,
                max_target_tokens=16,
                return_scores=True,
            )
        )

    alone = {request: translate(request) for request in asked}
    together = random.Random(1).sample(asked * 2, len(asked) * 2)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(translate, together)) == [alone[request] for request in together]


def test_a_stream_tells_the_greedy_translation(client: TranslationClient) -> None:
    for line in ENGLISH_LINES[:5]:
        pieces = list(client.translate_stream(line, max_target_tokens=24, return_scores=True))
        (whole,) = client.translate([line], max_target_tokens=24, return_scores=True)
        assert "".join(piece.text_delta for piece in pieces) == whole.text
        last = pieces[-1].translation
        assert last is not None
        assert answers([last]) == answers([whole])


@pytest.mark.parametrize("beam_size", [1, 4])
def test_translations_start_with_their_prefixes(client: TranslationClient, beam_size: int) -> None:
    lines, prefixes = ENGLISH_LINES[:4], ["ein mann", "", "zwei hunde", "das"]
    asked: dict[str, Any] = {"beam_size": beam_size, "num_hypotheses": beam_size, "max_target_tokens": 30}
    translations = client.translate(lines, target_prefixes=prefixes, **asked)
    for translation, prefix in zip(translations, prefixes, strict=True):
        assert len(translation.hypotheses) == beam_size
        assert all(hypothesis.text.startswith(prefix) for hypothesis in translation.hypotheses)
    alone = [client.translate([line], target_prefixes=[prefix], **asked)[0] for line, prefix in zip(lines, prefixes, strict=True)]
    assert answers(alone) == answers(translations)
    assert answers([translations[1]]) == answers(client.translate([lines[1]], **asked))


def test_a_prefix_pulls_as_strongly_as_is_asked_for(client: TranslationClient) -> None:
    line, prefix = ENGLISH_LINES[0], "ein mann"
    (free,) = client.translate([line], max_target_tokens=20)
    assert not free.text.startswith(prefix)
    (strongly,) = client.translate([line], target_prefixes=[prefix], prefix_bias=0.999, max_target_tokens=20)
    (weakly,) = client.translate([line], target_prefixes=[prefix], prefix_bias=1e-6, max_target_tokens=20)
    assert strongly.text.startswith(prefix)
    assert weakly.text == free.text


def test_a_stream_tells_its_prefix_too(client: TranslationClient) -> None:
    pieces = list(client.translate_stream(ENGLISH_LINES[0], target_prefix="ein mann", max_target_tokens=24))
    (whole,) = client.translate([ENGLISH_LINES[0]], target_prefixes=["ein mann"], max_target_tokens=24)
    assert len(pieces) > 1
    assert "".join(piece.text_delta for piece in pieces) == whole.text
    assert whole.text.startswith("ein mann")


def usual_piece(tokenizer: Tokenizer, text: str) -> str:
    """The most frequent piece of a text, but the one that is a space alone."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece())
    pieces = [model.id_to_piece(i) for i in tokenizer.encode_target(text) or ()]
    return max(set(pieces) - {"\u2581"}, key=pieces.count)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("option", ["suppressed_texts", "suppressed_sequences"])
def test_what_is_suppressed_is_in_no_translation(
    client: TranslationClient, tiny_bundle: Bundle, option: str, beam_size: int
) -> None:
    tokenizer = load_tokenizer(tiny_bundle)
    asked: dict[str, Any] = {"beam_size": beam_size, "max_target_tokens": 16}
    (free,) = client.translate([ENGLISH_LINES[0]], **asked)
    piece = usual_piece(tokenizer, free.text)
    asked |= {option: [piece.replace("\u2581", "")] if option == "suppressed_texts" else [[piece]]}
    (other,) = client.translate([ENGLISH_LINES[0]], **asked)
    assert other.text != free.text
    assert tokenizer.target_id(piece) not in (tokenizer.encode_target(other.text) or ())


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_translation_ends_at_further_tokens(client: TranslationClient, tiny_bundle: Bundle, beam_size: int) -> None:
    asked: dict[str, Any] = {"beam_size": beam_size, "max_target_tokens": 16, "length_penalty": 0.0}
    (free,) = client.translate([ENGLISH_LINES[0]], **asked)
    piece = usual_piece(load_tokenizer(tiny_bundle), free.text)
    (cut,) = client.translate([ENGLISH_LINES[0]], end_tokens=[piece], **asked)
    (whole,) = client.translate([ENGLISH_LINES[0]], end_tokens=[piece], return_end_token=True, **asked)
    assert cut.hypotheses[0].finish_reason == "eos"
    assert cut.hypotheses[0].target_tokens < 16
    assert whole.text == cut.text + piece.replace("\u2581", " ")
    if beam_size == 1:
        pieces = list(client.translate_stream(ENGLISH_LINES[0], end_tokens=[piece], **asked))
        assert "".join(piece.text_delta for piece in pieces) == cut.text


def test_lengths_by_ratio_are_kept(client: TranslationClient) -> None:
    for line in ENGLISH_LINES[:4]:
        (translation,) = client.translate([line], beam_size=3, num_hypotheses=3, min_target_ratio=0.5, max_target_ratio=0.7)
        for hypothesis in translation.hypotheses:
            assert 0.5 * translation.source_tokens <= hypothesis.target_tokens <= 0.7 * translation.source_tokens


@pytest.mark.parametrize("beam_size", [1, 3])
def test_attention_is_told_on_request_and_to_nobody_else(client: TranslationClient, beam_size: int) -> None:
    texts = ENGLISH_LINES[:4]
    plain = client.translate(texts, beam_size=beam_size)
    told = client.translate(texts, beam_size=beam_size, return_attention=True)
    for one, other in zip(told, plain, strict=True):
        hypothesis = one.hypotheses[0]
        assert hypothesis.text == other.text
        assert (other.source_pieces, other.hypotheses[0].attention) == ((), ())
        # With the end of the sentence, which is none of the text's own.
        assert len(one.source_pieces) == one.source_tokens - 1
        assert (
            len(hypothesis.attention)
            == len(hypothesis.target_pieces)
            == hypothesis.target_tokens - (hypothesis.finish_reason == "eos")
        )
        assert all(len(row) == len(one.source_pieces) and 0 < sum(row) < 1 + 1e-6 for row in hypothesis.attention)


def test_scores_of_targets_do_not_depend_on_what_else_is_asked(client: TranslationClient) -> None:
    pairs = [(line, other) for line in ENGLISH_LINES[:12] for other in (line, ENGLISH_LINES[3], "")]
    together = client.score([text for text, _ in pairs], [target for _, target in pairs])
    with ThreadPoolExecutor(8) as pool:
        translations = pool.map(lambda line: client.translate([line], beam_size=3, max_target_tokens=20), ENGLISH_LINES)
        alone = list(pool.map(lambda pair: client.score([pair[0]], [pair[1]])[0], pairs))
        list(translations)
    assert [one.log_probs for one in alone] == [one.log_probs for one in together]
    for (_, target), one in zip(pairs, together, strict=True):
        assert (one.tokens[-1], len(one.tokens) == 1) == ("</s>", not target)
        assert len(one.log_probs) == len(one.tokens) == one.timings.steps
        assert one.log_prob == pytest.approx(sum(one.log_probs))
        assert all(log_prob <= 0 for log_prob in one.log_probs)


def test_a_translation_is_scored_as_it_was_translated(client: TranslationClient) -> None:
    lines = list(ENGLISH_LINES)
    translated = [one.hypotheses[0] for one in client.translate(lines, return_token_scores=True, max_target_tokens=20)]
    scored = client.score(lines, target_tokens=[one.target_pieces for one in translated])
    # Their ends apart: the random model has none.
    assert [one.log_probs[:-1] for one in scored] == [one.token_scores for one in translated]


def test_targets_that_cannot_be_scored_are_named(client: TranslationClient) -> None:
    limits = client.model_info()
    with pytest.raises(InvalidRequestError, match=r"^targets\[1\]: has .* tokens with the end-of-sentence token"):
        client.score(["a", "a"], ["a", "a b c d e f g h " * limits.max_target_tokens])
    with pytest.raises(InvalidRequestError, match=r"^targets\[0\]: holds characters"):
        client.score(["a"], ["漢"])
    for token in ("</s>", "<s>", "<pad>", "no such token"):
        with pytest.raises(InvalidRequestError, match=r"^target_tokens\[0\]: .* is no token of text"):
            client.score(["a"], target_tokens=[[token]])
    # Spelled out in a text it is text, if the vocabulary has its characters at all.
    with pytest.raises(InvalidRequestError, match=r"^targets\[0\]: holds characters"):
        client.score(["a"], ["</s>"])


def test_target_lengths_are_kept(client: TranslationClient) -> None:
    for line in ENGLISH_LINES[:4]:
        (translation,) = client.translate([line], beam_size=3, num_hypotheses=3, min_target_tokens=5, max_target_tokens=7)
        for hypothesis in translation.hypotheses:
            assert 6 <= hypothesis.target_tokens <= 7


def test_timings_are_told(client: TranslationClient) -> None:
    (translation,) = client.translate([ENGLISH_LINES[0]], min_target_tokens=8, max_target_tokens=8)
    timings = translation.timings
    assert timings.steps == 8
    assert timings.encode_s > 0
    assert timings.decode_s > 0
    assert timings.mean_rows_per_step >= 1


def test_a_request_out_of_the_models_bounds_names_the_field(client: TranslationClient) -> None:
    limits = client.model_info()
    with pytest.raises(InvalidRequestError, match=r"^texts\[1\]: has .* tokens"):
        client.translate(["a", "a b c d e f g h " * limits.max_source_tokens])
    with pytest.raises(InvalidRequestError, match=r"^options\.beam_size: "):
        client.translate(["a"], beam_size=limits.max_beam_size + 1)


def test_requests_that_are_left_give_their_rows_back(served: Served, client: TranslationClient) -> None:
    longest = client.model_info().max_target_tokens
    for line in ENGLISH_LINES[:8]:
        stream = client.translate_stream(line, min_target_tokens=longest, max_target_tokens=longest)
        next(stream)
        stream.close()  # type: ignore[attr-defined]  # a generator
        with pytest.raises(DeadlineExceededError):
            client.translate([line], timeout_s=0.001)
    # Rows are free at the next step of their worker, which nobody here can see the end of.
    ends_at_s = time.monotonic() + PATIENCE_S
    while metric(served, "onnxlate_rows_in_use") + metric(served, "onnxlate_queue_length"):
        assert time.monotonic() < ends_at_s


def test_the_metrics_page_tells_of_the_engine(served: Served, client: TranslationClient) -> None:
    before = metric(served, "onnxlate_target_tokens_total")
    client.translate([ENGLISH_LINES[0]], min_target_tokens=4, max_target_tokens=4)
    assert metric(served, "onnxlate_target_tokens_total") == before + 4
    assert metric(served, "onnxlate_cache_bytes") > 0
    assert metric(served, "onnxlate_rows_per_step_count") > 0
    assert metric(served, "onnxlate_time_to_first_token_seconds_count") > 0
