"""Argos Translate's packages: a model of CTranslate2, its tokenizer, and what languages they are of.

A zip archive (``.argosmodel``), or the directory that it unpacks to: ``metadata.json`` (``from_code``, ``to_code``), ``model/``
(``ctranslate2.py``) and ``sentencepiece.model`` or ``bpe.model`` (codes for words that Moses' scripts cut); an archive has one
directory around them. Knows this layout and how to unpack an archive that may come from anywhere; does not know the model's
files.

Not done here: the package's own splitting of a text into sentences, whose models lie in ``stanza/`` and are left out.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.ctranslate2 import read_directory
from export.checkpoint.hugging_face import read_json
from serving.bundle import LanguagePair, MosesSpec, field_faults
from serving.errors import CheckpointError

METADATA_NAME, MODEL_NAME = "metadata.json", "model"
SENTENCEPIECE_NAME, CODES_NAME = "sentencepiece.model", "bpe.model"
SUFFIX = ".argosmodel"
# What of a package is unpacked.
_UNPACKED = (METADATA_NAME, MODEL_NAME, SENTENCEPIECE_NAME, CODES_NAME)
# Weights hardly compress: an archive that unpacks to many times its size is none of a model, and could fill the disk.
_MOST_UNPACKED = 20
_UNPACKED_ANYWAY_BYTES = 2**24
# Real ones have some dozens.
_MOST_MEMBERS = 10_000

_Text = Annotated[str, Field(min_length=1)]


class _Metadata(BaseModel):
    """The fields of ``metadata.json`` that a translation needs."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    from_code: _Text
    to_code: _Text
    # Others split text into sentences.
    type: Literal["translate"] = "translate"
    # A token that every target starts with; empty for none.
    target_prefix: str = ""


class ArgosReader:
    """Reads this format; see ``CheckpointReader``."""

    description = (
        f"Argos Translate (*{SUFFIX}, or its directory: {METADATA_NAME}, {MODEL_NAME}/, {SENTENCEPIECE_NAME} or {CODES_NAME})"
    )

    def recognizes(self, path: Path) -> bool:
        """Whether it is a directory of this layout, or a file called ``.argosmodel``; whether that is one, ``read`` tells."""
        if path.is_dir():
            return (path / METADATA_NAME).is_file() and (path / MODEL_NAME).is_dir()
        return path.suffix == SUFFIX and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        """Read and check the whole package; an archive is unpacked to a temporary directory, which is removed.

        Raises:
            CheckpointError: with every fault.
        """
        if path.is_dir():
            return _read_package(path, path)
        with tempfile.TemporaryDirectory(prefix="onnxlate-") as directory:
            _unpack(path, Path(directory))
            checkpoint = _read_package(Path(directory), path)
            contents = {
                name: file.read_bytes() if isinstance(file, Path) else file for name, file in checkpoint.tokenizer_files.items()
            }
        return replace(checkpoint, tokenizer_files=dict(contents))


def _read_package(directory: Path, path: Path) -> Checkpoint:
    """The package in a directory; ``path`` is what the user has of it."""
    faults: list[str] = []
    metadata = _read_metadata(directory, faults)
    if not any((directory / name).is_file() for name in (SENTENCEPIECE_NAME, CODES_NAME)):
        faults.append(f"{SENTENCEPIECE_NAME}: is missing, and so is {CODES_NAME}")
    if metadata is None or faults:
        raise CheckpointError(path, faults)
    moses = MosesSpec(
        source_language=metadata.from_code,
        target_language=metadata.to_code,
        normalize_punctuation=True,
        aggressive_dash_splits=False,
        escape=True,
    )
    try:
        checkpoint = read_directory(
            directory / MODEL_NAME,
            tokenizer_directory=directory,
            codes=(CODES_NAME,),
            moses=moses,
            target_prefix=metadata.target_prefix or None,
        )
    except CheckpointError as error:
        raise CheckpointError(path, error.faults) from error
    # Beside the package: where it is a file, in the directory of that.
    sample_lines = read_samples(path if path.is_dir() else path.parent, faults)
    if faults:
        raise CheckpointError(path, faults)
    return replace(
        checkpoint,
        name=path.resolve().name.removesuffix(SUFFIX),
        languages=[LanguagePair(source=metadata.from_code, target=metadata.to_code)],
        language_tokens=None,
        sample_lines=sample_lines,
    )


def _read_metadata(directory: Path, faults: list[str]) -> _Metadata | None:
    found: list[str] = []
    document = read_json(directory / METADATA_NAME, found)
    if document is None:
        faults += found or [f"{METADATA_NAME}: is missing"]
        return None
    try:
        return _Metadata.model_validate(document)
    except ValidationError as error:
        faults += [f"{METADATA_NAME}: {fault}" for fault in field_faults(error.errors())]
        return None


def _unpack(path: Path, directory: Path) -> None:
    """Unpack what of a package is needed, without the directory around it.

    Raises:
        CheckpointError: it is no zip archive, or one that could write or fill what it should not; nothing was unpacked then.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if faults := _archive_faults(path, members):
                raise CheckpointError(path, faults)
            roots = [PurePosixPath(info.filename).parent for info in members if _is_metadata(info.filename)]
            if len(roots) != 1:
                raise CheckpointError(path, [f"{METADATA_NAME}: is there {len(roots)} times, in no directory or one"])
            for info in members:
                name = PurePosixPath(info.filename)
                inner = name.relative_to(roots[0]) if name.is_relative_to(roots[0]) else PurePosixPath()
                if info.is_dir() or not inner.parts or inner.parts[0] not in _UNPACKED:
                    continue
                destination = directory / inner
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, destination.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except CheckpointError:
        raise
    # A broken archive makes zipfile and the decompressors raise nearly anything.
    except Exception as error:
        raise CheckpointError(path, [f"cannot be unpacked: {error or type(error).__name__}"]) from error


def _is_metadata(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name == METADATA_NAME and len(path.parts) <= 2


def _archive_faults(path: Path, members: list[zipfile.ZipInfo]) -> list[str]:
    """Why an archive must not be unpacked; empty when it may."""
    faults = [f"{info.filename!r}: {fault}" for info in members if (fault := _member_fault(info))]
    faults += [f"{name!r}: is there {count} times" for name, count in Counter(i.filename for i in members).items() if count > 1]
    packed_bytes, unpacked_bytes = path.stat().st_size, sum(info.file_size for info in members)
    if unpacked_bytes > max(_MOST_UNPACKED * packed_bytes, _UNPACKED_ANYWAY_BYTES):
        faults.append(f"unpacks to {unpacked_bytes} bytes, and is itself of {packed_bytes}; no package does that")
    if len(members) > _MOST_MEMBERS:
        faults.append(f"has {len(members)} members; no package has")
    return faults[:20]


def _member_fault(info: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked; None when it may."""
    path = PurePosixPath(info.filename)
    if path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
        return "is no name within the archive; nothing outside is written"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no file; links are not followed"
    if info.flag_bits & 1:
        return "is encrypted"
    return None
