"""Argos Translate's packages: a model of CTranslate2, its tokenizer, and what languages they are of.

A zip archive (``.argosmodel``), or the directory that it unpacks to: ``metadata.json`` (``from_code``, ``to_code``), ``model/``
(``ctranslate2.py``) and ``sentencepiece.model`` or ``bpe.model`` (codes for words that Moses' scripts cut); an archive has one
directory around them. Knows this layout; does not know how an archive is unpacked (``packages.py``) or the model's files.

Not done here: the package's own splitting of a text into sentences, whose models lie in ``stanza/`` and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from export.checkpoint.base import Checkpoint, read_samples
from export.checkpoint.ctranslate2 import read_directory
from export.checkpoint.hugging_face import read_json
from export.checkpoint.packages import detached, unpacked
from serving.errors import CheckpointError
from serving.manifest import LanguagePair, MosesSpec, field_faults

METADATA_NAME, MODEL_NAME = "metadata.json", "model"
SENTENCEPIECE_NAME, CODES_NAME = "sentencepiece.model", "bpe.model"
SUFFIX = ".argosmodel"
# What of a package is unpacked.
_UNPACKED = (METADATA_NAME, MODEL_NAME, SENTENCEPIECE_NAME, CODES_NAME)

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
        with unpacked(path, _places) as directory:
            return detached(_read_package(directory, path))


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


def _places(names: Sequence[PurePosixPath]) -> dict[PurePosixPath, PurePosixPath]:
    """What of a package is needed, without the directory around it."""
    roots = [name.parent for name in names if name.name == METADATA_NAME and len(name.parts) <= 2]
    if len(roots) != 1:
        raise ValueError(f"{METADATA_NAME}: is there {len(roots)} times, in no directory or one")
    inner = {name: name.relative_to(roots[0]) for name in names if name.is_relative_to(roots[0])}
    return {name: place for name, place in inner.items() if place.parts[0] in _UNPACKED}
