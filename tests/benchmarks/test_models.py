from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
from benchmarks.models import BenchModel


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was written, by a writer that only makes the directory."""
    made: list[Path] = []

    def aside(function: Any, source: Path, directory: Path, *rest: Any) -> None:
        made.append(directory)
        directory.mkdir()

    monkeypatch.setattr(models, "aside", aside)
    monkeypatch.setattr(models, "_version", lambda package: "1.0")
    return made


def model(tmp_path: Path, weights: bytes, *, file_name: str = "model.safetensors") -> BenchModel:
    checkpoint = tmp_path / weights.decode() / file_name
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(weights)
    return BenchModel(name="any", description="", build=tmp_path / "build", checkpoint=checkpoint.parent, is_native=True)


def forms_of(one: BenchModel) -> list[Path]:
    return [one.bundle("int8"), one.ctranslate2("int8"), one.marian()]


@pytest.mark.parametrize("file_name", ["model.safetensors", "pytorch_model.bin"])
def test_a_form_of_other_weights_is_not_taken(tmp_path: Path, written: list[Path], file_name: str) -> None:
    first, second = (model(tmp_path, weights, file_name=file_name) for weights in (b"one", b"two"))
    assert not set(forms_of(first)) & set(forms_of(second))
    assert len(written) == 6


def test_a_form_of_the_same_weights_is_made_once(tmp_path: Path, written: list[Path]) -> None:
    first = model(tmp_path, b"one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    second = BenchModel(name="any", description="", build=first.build, checkpoint=tmp_path / "copy", is_native=True)
    assert forms_of(first) == forms_of(second)
    assert len(written) == 3


def test_a_form_of_another_converter_is_not_taken(tmp_path: Path, written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(tmp_path, b"one")
    _, *before = forms_of(one)
    monkeypatch.setattr(models, "converter_digest", lambda: "changed")
    _, *after = forms_of(one)
    assert not set(before) & set(after)
