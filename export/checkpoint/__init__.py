"""Checkpoints: a reader for each format, one result for all. Another format is another reader in ``_READERS``."""

from __future__ import annotations

from pathlib import Path

from export.checkpoint.base import Checkpoint, CheckpointReader, build_model
from export.checkpoint.marian import MarianReader
from export.checkpoint.native import NativeReader, write_native_checkpoint
from serving.errors import CheckpointError

__all__ = ["Checkpoint", "build_model", "read_checkpoint", "write_native_checkpoint"]

_READERS: tuple[CheckpointReader, ...] = (NativeReader(), MarianReader())


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read a checkpoint of any known format.

    Raises:
        CheckpointError: the format is not known, or the checkpoint has faults; all of them are named.
    """
    if not directory.is_dir():
        raise CheckpointError(directory, ["there is no such directory"])
    for reader in _READERS:
        if reader.recognizes(directory):
            return reader.read(directory)
    known = "; ".join(reader.description for reader in _READERS)
    raise CheckpointError(directory, [f"it is of no known format. Known: {known}"])
