"""Exports of a model of 1.37 billion parameters within twice its size of memory.

Not part of the usual tests: each takes some ten minutes on one core, 11 GB of memory and 20 GB of disk.
``make test-large`` runs them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serving.manifest import Precision
from tests.export.large_checkpoint import LANGUAGES, Size, write_large_checkpoint
from tests.support import ENGLISH_LINES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.large


@dataclass(frozen=True, slots=True)
class LargeCheckpoint:
    directory: Path
    # Of all parameters in float32.
    parameter_bytes: int


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LargeCheckpoint]:
    directory = tmp_path_factory.mktemp("large") / "nllb"
    try:
        yield LargeCheckpoint(directory, write_large_checkpoint(directory, Size()))
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A bundle's; pytest would keep it for its next runs."""
    yield tmp_path / "bundle"
    shutil.rmtree(tmp_path / "bundle", ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Finished:
    output: str
    # The most memory that the process had at once, pages of files included.
    peak_bytes: int


def run(command: list[str], given: str = "") -> Finished:
    """Run a command of onnxlate to its end, in a process of its own."""
    with subprocess.Popen(
        [sys.executable, "-m", "serving.cli", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(given)
        process.stdin.close()
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return Finished(output, usage.ru_maxrss * 1024)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_takes_at_most_twice_the_parameters_of_memory(
    checkpoint: LargeCheckpoint, place: Path, precision: Precision
) -> None:
    exported = run(["export", str(checkpoint.directory), str(place), "--precision", precision])
    assert exported.peak_bytes <= 2 * checkpoint.parameter_bytes
    source, target = LANGUAGES
    languages = ["--source-language", source, "--target-language", target]
    lines = ENGLISH_LINES[:2]
    translated = run(
        ["translate", "--bundle", str(place), "--threads", "1", "--max-target-tokens", "8", *languages], "\n".join(lines)
    )
    assert len(translated.output.splitlines()) == len(lines)
    print(f"{precision}: export {exported.peak_bytes / 1e9:.2f} GB, translating {translated.peak_bytes / 1e9:.2f} GB")
