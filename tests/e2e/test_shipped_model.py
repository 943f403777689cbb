"""The model that the project ships: the product as `make demo` has it, and the promise about neighbours at its real sizes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.client import TranslationClient
from serving.config import EngineConfig, RequestLimits
from serving.model import load_model
from serving.observer import NullObserver
from tests.fakes import PATIENCE_S
from tests.servers import running_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "examples" / "multi30k" / "checkpoint"
CLIENTS = 64


@pytest.fixture(scope="module", params=["fp32", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("shipped") / request.param
    return export_bundle(CHECKPOINT, directory, precision=request.param, show_progress=False)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Sentences of 1 to about 80 words, all different."""
    words = (CHECKPOINT / "samples.txt").read_text().replace(".", "").split()
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=rng.choice([1, 2, 5, 9, 12, 14, 17, 30, 80]))) + "." for _ in range(160)]


Answers = dict[str, list[tuple[str, float | None]]]


def answer(client: TranslationClient, line: str, beam_size: int) -> list[tuple[str, float | None]]:
    (translation,) = client.translate(
        [line], beam_size=beam_size, num_hypotheses=beam_size, return_scores=True, timeout_s=PATIENCE_S
    )
    assert None not in [hypothesis.score for hypothesis in translation.hypotheses]
    return [(hypothesis.text, hypothesis.score) for hypothesis in translation.hypotheses]


@pytest.fixture(scope="module")
def address(bundle: Bundle) -> Iterator[str]:
    config = EngineConfig(threads=2)
    with running_server(load=lambda metrics: load_model(bundle.directory, config, RequestLimits(), metrics)) as server:
        yield server.address


@pytest.mark.parametrize("beam_size", [1, 4])
def test_many_clients_at_once_get_the_answers_of_one_alone(address: str, lines: list[str], beam_size: int) -> None:
    with TranslationClient(address) as client:
        alone: Answers = {line: answer(client, line, beam_size) for line in lines}
        shuffled = random.Random(1).sample(lines, len(lines))
        with ThreadPoolExecutor(CLIENTS) as pool:
            crowded = dict(zip(shuffled, pool.map(lambda line: answer(client, line, beam_size), shuffled), strict=True))
    # Text and score as they are, no tolerance.
    assert crowded == alone


def test_offline_answers_are_the_servers(bundle: Bundle, address: str, lines: list[str]) -> None:
    command = [sys.executable, "-m", "serving.cli", "translate", "--beam-size", "4"]
    through = {"server": ["--server", address, "--batch-size", "7"], "bundle": ["--bundle", str(bundle.directory)]}
    text = "".join(f"{line}\n" for line in lines)
    outputs = {
        name: subprocess.run([*command, *where], cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout
        for name, where in through.items()
    }
    assert outputs["server"] == outputs["bundle"]
    assert outputs["server"].count("\n") == len(lines)


def test_the_checkpoint_is_small_and_its_certificate_good(bundle: Bundle) -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 16e6
    comparisons = bundle.manifest.certificate.comparisons
    assert comparisons["onnx_fp32"].token_agreement == 1
    if bundle.manifest.precision == "int8":
        assert comparisons["onnx_int8"].token_agreement > 0.97


def test_it_translates(bundle: Bundle) -> None:
    model = load_model(bundle.directory, EngineConfig(threads=1), RequestLimits(), NullObserver())
    model.engine.close()
    assert model.description.name == "multi30k-en-de"
    command = [sys.executable, "-m", "serving.cli", "translate", "--bundle", str(bundle.directory)]
    done = subprocess.run(command, cwd=ROOT, input="Two dogs run.\n\nA man.\n", capture_output=True, text=True, check=True)
    first, blank, last = done.stdout.splitlines()
    assert "Hunde" in first
    assert blank == ""
    assert "Mann" in last


def test_the_demo(bundle: Bundle) -> None:
    command = [sys.executable, "-m", "examples.demo", str(bundle.directory)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Hunde" in shown
    assert "The server ended with status 0." in shown
