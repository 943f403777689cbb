"""Marian's binary models (``.bin``), which are not read: said by name, and what to do.

Bergamot's and Firefox's models come so: quantized for Marian's own products, and most of them with a recurrent decoder. Knows
how such a file begins; does not know the rest of it.
"""

from __future__ import annotations

from pathlib import Path

from export.checkpoint.base import Checkpoint
from serving.errors import CheckpointError

# The version, uint64; CTranslate2's model.bin begins with one of 32 bits, which is larger, and a name behind it.
_BEGINNING = (1).to_bytes(8, "little")


class MarianBinaryReader:
    """Recognizes this format and says why it is not read; see ``CheckpointReader``."""

    description = "Marian's binary form (*.bin), which is not read: its .npz is"

    def recognizes(self, path: Path) -> bool:
        """Whether it is a ``.bin`` that begins as Marian's do, or a directory with such a one and no ``.npz`` beside it."""
        if path.is_dir():
            return not any(path.glob("*.npz")) and bool(_models_in(path))
        return path.suffix == ".bin" and is_marian_binary(path)

    def read(self, path: Path) -> Checkpoint:
        """Read nothing.

        Raises:
            CheckpointError: always.
        """
        names = [model.name for model in _models_in(path)] if path.is_dir() else [path.name]
        raise CheckpointError(
            path,
            [
                f"{name}: is a model in Marian's binary form, as Bergamot's and Firefox's are; its weights may be quantized for "
                "Marian alone, and only .npz is read. Take the .npz that it was made of; of one that is not quantized, "
                f"marian-conv -f {name} -t model.npz writes one"
                for name in names
            ],
        )


def _models_in(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*.bin")) if path.is_file() and is_marian_binary(path)]


def is_marian_binary(path: Path) -> bool:
    """Whether a file begins as Marian's binary models do; False where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_BEGINNING)) == _BEGINNING
    except OSError:
        return False
