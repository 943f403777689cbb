"""The reader of Argos Translate's packages: real ones, incomplete ones, and archives that mean harm."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.checkpoint import read_checkpoint
from export.pipeline import export_bundle
from serving.errors import CheckpointError
from serving.manifest import LanguagePair, SubwordNmtTokenizerSpec
from serving.tokenizers import load_tokenizer, open_tokenizer
from tests.export.test_ctranslate2 import CONFIG, binary, flag, variables, write
from tests.support import ENGLISH_LINES, tiny_sentencepiece
from tests.vocabularies import marian_vocabulary

METADATA = {
    "package_version": "1.0",
    "argos_version": "1.5",
    "from_code": "en",
    "from_name": "English",
    "to_code": "de",
    "to_name": "German",
}
# As OpenNMT numbers tokens, and in the order of its vocabularies.
TOKENS = ["<unk>", "<s>", "</s>", *(piece for piece in marian_vocabulary(tiny_sentencepiece()) if not piece.startswith("<"))]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An unpacked package."""
    directory = tmp_path / "translate-en_de"
    (directory / "stanza" / "en").mkdir(parents=True)
    (directory / "stanza" / "en" / "tokenize.pt").write_bytes(b"not looked at")
    (directory / "metadata.json").write_text(json.dumps(METADATA))
    (directory / "sentencepiece.model").write_bytes(tiny_sentencepiece())
    write(directory / "model", binary(variables(len(TOKENS), len(TOKENS))), shared=TOKENS)
    return directory


def packed(directory: Path, *, root: str = "translate-en_de-1_0/") -> Path:
    """The archive of a package."""
    path = directory.with_name("translate-en_de-1_0.argosmodel")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(directory.rglob("*")):
            archive.write(file, f"{root}{file.relative_to(directory)}")
    return path


def edit_metadata(directory: Path, **changes: Any) -> None:
    (directory / "metadata.json").write_text(json.dumps({**METADATA, **changes}))


def faults_of(path: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be used") as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    return caught.value.faults


@pytest.mark.parametrize("root", ["translate-en_de-1_0/", ""], ids=["in a directory", "in none"])
def test_reads_an_archive(package: Path, root: str) -> None:
    path = packed(package, root=root)
    (path.parent / "samples.txt").write_text("a man runs\n")
    checkpoint = read_checkpoint(path)
    assert checkpoint.name == "translate-en_de-1_0"
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
    assert checkpoint.target_prefix == ()
    assert checkpoint.sample_lines == ["a man runs"]
    assert all(isinstance(contents, bytes) for contents in checkpoint.tokenizer_files.values())
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.decode(tokenizer.encode(ENGLISH_LINES[0])) == ENGLISH_LINES[0]


def test_a_directory_and_its_archive_are_the_same_model(package: Path) -> None:
    one, other = read_checkpoint(package), read_checkpoint(packed(package))
    assert one.name == "translate-en_de"
    assert one.weights_sha256 == other.weights_sha256
    assert one.config == other.config
    assert one.tensors.keys() == other.tensors.keys()
    assert all(tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items())


def test_exported(package: Path, tmp_path: Path) -> None:
    path = packed(package)
    (path.parent / "samples.txt").write_text("\n".join(ENGLISH_LINES[:2]))
    bundle = export_bundle(path, tmp_path / "bundle", show_progress=False)
    assert bundle.manifest.languages == [LanguagePair(source="en", target="de")]
    assert load_tokenizer(bundle).encode("a man")
    # What was unpacked is gone, and nothing was written beside the package.
    assert {entry.name for entry in tmp_path.iterdir()} == {"bundle", "samples.txt", package.name, path.name}


def test_a_target_prefix(package: Path) -> None:
    edit_metadata(package, target_prefix=TOKENS[5])
    assert read_checkpoint(package).target_prefix == (5,)
    edit_metadata(package, target_prefix="__none__")
    assert faults_of(package) == ("target_prefix: '__none__' is not in the target vocabulary",)


def test_byte_pair_codes(package: Path) -> None:
    (package / "sentencepiece.model").unlink()
    (package / "bpe.model").write_text("#version: 0.2\na b\nab c</w>\n")
    spec = read_checkpoint(package).tokenizer
    assert isinstance(spec, SubwordNmtTokenizerSpec)
    assert (spec.source_codes, spec.target_codes) == ("bpe.model", "bpe.model")
    assert spec.moses is not None
    assert (spec.moses.source_language, spec.moses.target_language) == ("en", "de")


@pytest.mark.parametrize("ends", [True, False])
def test_sources_end_in_a_token_where_the_model_was_made_so(package: Path, ends: bool) -> None:
    (package / "model" / "config.json").write_text(json.dumps({**CONFIG, "add_source_eos": ends}))
    assert read_checkpoint(package).source_ends_with_eos == ends


@pytest.mark.parametrize(
    ("spoil", "faults"),
    [
        pytest.param(
            lambda package: edit_metadata(package, from_code=None, type="sbd"),
            ["metadata.json: from_code: Input should be a valid string", "metadata.json: type: Input should be 'translate'"],
            id="metadata",
        ),
        pytest.param(
            lambda package: (package / "sentencepiece.model").unlink(),
            ["sentencepiece.model: is missing, and so is bpe.model"],
            id="no tokenizer",
        ),
        pytest.param(
            lambda package: (package / "sentencepiece.model").write_bytes(b"no model"),
            ["sentencepiece.model: is no SentencePiece model"],
            id="another tokenizer",
        ),
        pytest.param(
            lambda package: (package / "model" / "model.bin").write_bytes(b"\x06"),
            ["model.bin: ends within a number, at byte 1"],
            id="broken model",
        ),
        pytest.param(
            lambda package: (package / "model" / "model.bin").unlink(),
            ["model.bin: cannot be read: No such file or directory"],
            id="no model",
        ),
    ],
)
@pytest.mark.parametrize("pack", [packed, lambda package: package], ids=["archive", "directory"])
def test_a_package_with_faults(
    package: Path, spoil: Callable[[Path], object], faults: list[str], pack: Callable[[Path], Path]
) -> None:
    spoil(package)
    found = faults_of(pack(package))
    assert len(found) == len(faults)
    for fault, start in zip(found, faults, strict=True):
        assert fault.startswith(start)


def add(name: str, contents: bytes = b"x", mode: int = 0o644) -> Callable[[zipfile.ZipFile], None]:
    def write_member(archive: zipfile.ZipFile) -> None:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name  # as it is: the constructor would clean it
        info.external_attr = mode << 16
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, contents)

    return write_member


OUTSIDE = "is no name within the archive; nothing outside is written"


@pytest.mark.parametrize(
    ("hostile", "fault"),
    [
        pytest.param(add("../outside.txt"), f"'../outside.txt': {OUTSIDE}", id="above"),
        pytest.param(add("p/model/../../../outside.txt"), f"'p/model/../../../outside.txt': {OUTSIDE}", id="above, hidden"),
        pytest.param(add("/tmp/outside.txt"), f"'/tmp/outside.txt': {OUTSIDE}", id="absolute"),
        pytest.param(add("p\\..\\outside.txt"), f"'p\\\\..\\\\outside.txt': {OUTSIDE}", id="backslashes"),
        pytest.param(
            add("translate-en_de-1_0/model/link", b"/etc/passwd", stat.S_IFLNK | 0o777),
            "'translate-en_de-1_0/model/link': is no file; links are not followed",
            id="link",
        ),
        pytest.param(
            add("translate-en_de-1_0/model/zeros.bin", bytes(2**26)),
            "unpacks to ",
            id="bomb",
        ),
        pytest.param(
            add("other/metadata.json", b"{}"), "metadata.json: is there 2 times, in no directory or one", id="two packages"
        ),
    ],
)
def test_a_hostile_archive(package: Path, tmp_path: Path, hostile: Callable[[zipfile.ZipFile], None], fault: str) -> None:
    path = packed(package)
    with zipfile.ZipFile(path, "a") as archive:
        hostile(archive)
    before = sorted(tmp_path.rglob("*"))
    (found,) = faults_of(path)
    assert found.startswith(fault)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        pytest.param(b"", "cannot be unpacked: File is not a zip file", id="empty"),
        pytest.param(b"no archive at all", "cannot be unpacked: File is not a zip file", id="no archive"),
    ],
)
def test_a_file_that_is_no_archive(tmp_path: Path, contents: bytes, fault: str) -> None:
    path = tmp_path / "en_de.argosmodel"
    path.write_bytes(contents)
    assert faults_of(path) == (fault,)


def test_an_archive_that_is_cut_or_altered(package: Path) -> None:
    path = packed(package)
    contents = bytearray(path.read_bytes())
    path.write_bytes(contents[: len(contents) // 2])
    assert faults_of(path) == ("cannot be unpacked: File is not a zip file",)
    # Within the weights, which are the most of it.
    contents[len(contents) // 3] ^= 0xFF
    path.write_bytes(contents)
    (fault,) = faults_of(path)
    assert fault.startswith("cannot be unpacked: ")


def test_an_archive_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "en_de.argosmodel"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("en_de/model/model.bin", b"")
    assert faults_of(path) == ("metadata.json: is there 0 times, in no directory or one",)


def test_a_model_of_many_languages_is_told_them_by_its_package(package: Path) -> None:
    tokens = [*TOKENS[:-2], ">>deu<<", ">>nld<<"]
    found = variables(len(tokens), len(tokens))
    found["decoder/start_from_zero_embedding"] = flag(1)
    write(package / "model", binary(found), shared=tokens)
    checkpoint = read_checkpoint(package)
    assert checkpoint.language_tokens is None
    assert checkpoint.languages == [LanguagePair(source="en", target="de")]
