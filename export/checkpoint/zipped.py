"""A checkpoint of any format in a ``.zip``, as OPUS-MT publishes its models.

Knows how what was unpacked is read as a directory; does not know how to unpack (``packages.py``) or any format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.checkpoint.base import Checkpoint, CheckpointReader, read_samples
from export.checkpoint.packages import detached, unpacked, within_one_directory
from export.checkpoint.unknown import unknown_faults
from serving.errors import CheckpointError


class ZipReader:
    """Reads archives of directories that other readers read; see ``CheckpointReader``."""

    description = "a .zip of the directory of any of these, as OPUS-MT's packages are"

    def __init__(self, readers: Sequence[CheckpointReader]) -> None:
        """``readers``: of directories, in the order in which they are asked."""
        self._readers = readers

    def recognizes(self, path: Path) -> bool:
        """Whether it is a file called ``.zip``; whether that is one, ``read`` tells."""
        return path.suffix == ".zip" and path.is_file()

    def read(self, path: Path) -> Checkpoint:
        """Read what is in the archive; it is unpacked to a temporary directory, which is removed.

        Raises:
            CheckpointError: with every fault.
        """
        with unpacked(path, within_one_directory) as directory:
            reader = next((reader for reader in self._readers if reader.recognizes(directory)), None)
            if reader is None:
                raise CheckpointError(path, unknown_faults(directory, self._readers))
            try:
                checkpoint = detached(reader.read(directory))
            except CheckpointError as error:
                raise CheckpointError(path, error.faults) from error
            # Most formats call a model as its directory is called.
            name = path.stem if checkpoint.name == directory.resolve().name else checkpoint.name
        faults: list[str] = []
        sample_lines = checkpoint.sample_lines or read_samples(path.parent, faults)
        if faults:
            raise CheckpointError(path, faults)
        return replace(checkpoint, name=name, sample_lines=sample_lines)
