from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from export.checkpoint import read_checkpoint
from export.pipeline import export_bundle
from serving.errors import CheckpointError


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    return caught.value.faults


def test_every_format_says_what_it_would_have(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("")
    first, heading, *formats = faults_of(tmp_path)
    assert first == "it holds notes.md"
    assert heading == "it is of no known format, which are:"
    told = "\n".join(formats)
    names = (
        "native",
        "Marian",
        "Argos",
        "CTranslate2",
        "M2M100",
        "BART",
        "Pegasus",
        "Marian's own",
        "fairseq",
        "OpenNMT-py",
        ".zip",
    )
    assert [name for name in names if name not in told] == []
    assert all(line.startswith("- ") for line in formats)


def nothing(path: Path) -> Path:
    return path


def bundle(path: Path) -> Path:
    (path / "manifest.json").write_text("{}")
    return path


def config(text: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / "config.json").write_text(text)
        return path

    return write


def file(name: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        (path / name).write_bytes(b"")
        return path / name

    return write


def inside(path: Path) -> Path:
    (path / "inner").mkdir()
    config(json.dumps({"model_type": "marian"}))(path / "inner")
    (path / "other").mkdir()
    return path


def many(path: Path) -> Path:
    for i in range(12):
        (path / f"{i:02}.txt").write_text("")
    return path


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (nothing, "it is an empty directory"),
        (bundle, "manifest.json: it is a bundle, which has been exported already"),
        (config(json.dumps({"model_type": "gpt2"})), "config.json: model_type 'gpt2' is none that is read"),
        (config(json.dumps({"model_type": ["x" * 99]})), "config.json: model_type \"['" + "x" * 38 + '" is none that is read'),
        (config("{}"), "config.json: has no model_type"),
        (config("["), "config.json: is not JSON"),
        (file("model.safetensors"), "it is a file: give the directory that model.safetensors lies in"),
        (file("model.tar.gz"), "it is an archive: unpack it, and give the directory"),
        (file("notes"), "it is of no known format, which are:"),
        (inside, "inner: give this directory, which is inside, instead"),
        (many, "it holds 00.txt, 01.txt, 02.txt, 03.txt, 04.txt, 05.txt, 06.txt, 07.txt, 08.txt, 09.txt and 2 more"),
    ],
    ids=["empty", "bundle", "family", "odd family", "no family", "no JSON", "part", "archive", "file", "inside", "many"],
)
def test_what_it_might_be(tmp_path: Path, make: Callable[[Path], Path], hint: str) -> None:
    assert faults_of(make(tmp_path))[0].startswith(hint)


def test_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        export_bundle(file("weights.h5")(tmp_path), tmp_path / "bundle", show_progress=False)
    assert not (tmp_path / "bundle").exists()
