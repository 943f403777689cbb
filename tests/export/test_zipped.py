"""Archives of checkpoints; what hostile ones do is told in ``test_argos.py``, whose packages are unpacked the same way."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from export.checkpoint import read_checkpoint
from serving.errors import CheckpointError
from tests.export.test_checkpoint import write


def packed(directory: Path, path: Path, root: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(directory.iterdir()):
            archive.write(file, f"{root}{file.name}")
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    write(made)
    return made


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return caught.value.faults


@pytest.mark.parametrize("root", ["", "any/"], ids=["no directory", "a directory"])
def test_is_the_checkpoint_that_is_in_it(directory: Path, tmp_path: Path, root: str) -> None:
    """Whatever its format; its own name and samples count."""
    one, other = read_checkpoint(directory), read_checkpoint(packed(directory, tmp_path / "m.zip", root))
    assert (one.name, one.config, one.weights_sha256) == (other.name, other.config, other.weights_sha256)
    assert one.sample_lines == other.sample_lines
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert {name: Path(file).read_bytes() for name, file in one.tokenizer_files.items() if isinstance(file, Path)} == (
        other.tokenizer_files
    )


def test_what_macos_adds_is_no_part_of_it(directory: Path, tmp_path: Path) -> None:
    path = packed(directory, tmp_path / "m.zip", "model/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/model/._config.json", b"\0")
    assert read_checkpoint(path).config == read_checkpoint(directory).config


def test_faults_are_those_of_what_is_in_it(directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert faults_of(packed(directory, tmp_path / "m.zip")) == faults_of(directory)


def test_something_else(tmp_path: Path) -> None:
    for name, members in (("none", []), ("some", ["b/c.txt", "a.txt"])):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for member in members:
                archive.writestr(member, b"")
    assert faults_of(tmp_path / "none.zip")[:2] == ("it is an empty directory", "it is of no known format, which are:")
    assert faults_of(tmp_path / "some.zip")[0] == "it holds a.txt, b"
    (tmp_path / "broken.zip").write_bytes(b"PK")
    assert faults_of(tmp_path / "broken.zip") == ("cannot be unpacked: File is not a zip file",)


@pytest.mark.parametrize("name", ["../config.json", "/config.json", "a\\b", "."])
def test_names_that_lead_out(directory: Path, tmp_path: Path, name: str) -> None:
    path = packed(directory, tmp_path / "m.zip")
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        archive.writestr(info, b"{}")
    before = sorted(tmp_path.rglob("*"))
    (fault,) = faults_of(path)
    assert fault == f"{name!r}: is no name within the archive; nothing outside is written"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_and_a_directory_of_one_name(directory: Path, tmp_path: Path) -> None:
    path = packed(directory, tmp_path / "m.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("config.json/inner", b"")
    (fault,) = faults_of(path)
    assert fault.startswith("cannot be unpacked: ")
