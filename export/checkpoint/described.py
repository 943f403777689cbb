"""Checkpoints that describe themselves in this project's own words: a ``config.json`` with the architecture and the tokenizer.

Knows what such descriptions have in common; does not know weights (``native.py``, ``torch_transformer.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from export.model import ModelConfig
from serving.errors import CheckpointError
from serving.manifest import AnyTokenizerSpec, LanguagePair, field_faults, name_fault, revision_fault
from serving.tokenizers import open_tokenizer

CONFIG_NAME = "config.json"


class Description(BaseModel):
    """What ``config.json`` holds at least."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    format_revision: int
    name: str = Field(min_length=1)
    languages: list[LanguagePair]
    tokenizer: AnyTokenizerSpec
    model: ModelConfig


_AnyDescription = TypeVar("_AnyDescription", bound=Description)


def mentions(directory: Path, format_name: str) -> bool:
    """Whether ``config.json`` mentions the format; a broken one is still of this format, and reading it tells what is wrong."""
    try:
        return f'"{format_name}"'.encode() in (directory / CONFIG_NAME).read_bytes()
    except OSError:
        return False


def read_description(directory: Path, kind: type[_AnyDescription], revisions: tuple[int, ...]) -> _AnyDescription:
    """What ``config.json`` says; raises CheckpointError with every fault.

    Args:
        directory: has it.
        kind: what it has to be.
        revisions: of the format, that can be read.
    """
    try:
        raw: Any = from_json((directory / CONFIG_NAME).read_bytes())
    except ValueError as error:
        raise CheckpointError(directory, [f"{CONFIG_NAME}: is not JSON: {error}"]) from error
    if fault := revision_fault(raw, revisions, "read it with a version of onnxlate that knows it"):
        raise CheckpointError(directory, [f"{CONFIG_NAME}: {fault}"])
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise CheckpointError(directory, [f"{CONFIG_NAME}: {fault}" for fault in field_faults(error.errors())]) from error


def find_tokenizer_files(directory: Path, description: Description, faults: list[str]) -> dict[str, Path | bytes]:
    """The tokenizer's files by name; what is wrong with them goes to ``faults``."""
    spec = description.tokenizer
    files: dict[str, Path | bytes] = {name: directory / name for name in spec.file_names}
    found = [fault for name in files if (fault := name_fault(name))]
    if not found:
        found = [f"{name}: is missing" for name in files if not (directory / name).is_file()]
    if not found:
        try:
            tokenizer = open_tokenizer(spec, files)
            found = tokenizer.vocabulary_faults(description.model.source_vocab_size, description.model.target_vocab_size)
        except (OSError, ValueError) as error:
            found = [str(error)]
    faults += found
    return files
