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

import pytest

from serving.bundle import Bundle
from serving.client import RemoteTranslation, TranslationClient
from serving.errors import DeadlineExceededError, InvalidRequestError
from tests.fakes import PATIENCE_S
from tests.support import ENGLISH_LINES

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
