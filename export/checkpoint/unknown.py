"""What to tell of a path that no reader recognizes: what it might be, and what each format would have.

Knows what users give instead of a checkpoint; does not know the formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from export.checkpoint.base import CheckpointReader
from export.checkpoint.hugging_face import CONFIG_NAME, read_json
from serving.manifest import MANIFEST_NAME

# Files that are part of a checkpoint, which is their directory.
_PARTS = (".bin", ".json", ".model", ".safetensors", ".spm", ".txt", ".yml")
_ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zst")
_MOST_NAMES = 10


def unknown_faults(path: Path, readers: Sequence[CheckpointReader]) -> list[str]:
    """Why a path is of none of the formats; the most helpful first, then a line for each format."""
    hints = [*(_directory_hints(path, readers) if path.is_dir() else _file_hints(path))]
    return [*hints, "it is of no known format, which are:", *(f"- {reader.description}" for reader in readers)]


def _directory_hints(path: Path, readers: Sequence[CheckpointReader]) -> Iterator[str]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        yield f"it cannot be read: {error.strerror}"
        return
    if not entries:
        yield "it is an empty directory"
    if (path / MANIFEST_NAME).is_file():
        yield f"{MANIFEST_NAME}: it is a bundle, which has been exported already"
    faults: list[str] = []
    document = read_json(path / CONFIG_NAME, faults)
    yield from faults
    if document is not None:
        kind = document.get("model_type")
        yield (
            f"{CONFIG_NAME}: model_type {str(kind)[:40]!r} is none that is read" if kind else f"{CONFIG_NAME}: has no model_type"
        )
    inner = [entry.name for entry in entries if entry.is_dir() and any(reader.recognizes(entry) for reader in readers)]
    if inner:
        yield f"{', '.join(inner[:_MOST_NAMES])}: give this directory, which is inside, instead"
    elif entries:
        more = f" and {len(entries) - _MOST_NAMES} more" if len(entries) > _MOST_NAMES else ""
        yield f"it holds {', '.join(entry.name for entry in entries[:_MOST_NAMES])}{more}"


def _file_hints(path: Path) -> Iterator[str]:
    if path.suffix in _ARCHIVES:
        yield "it is an archive: unpack it, and give the directory"
    elif path.suffix in _PARTS:
        yield f"it is a file: give the directory that {path.name} lies in, with all that belongs to it"
