"""Checkpoints: a reader for each format, one result for all. Another format is another reader in ``_DIRECTORY_READERS``."""

from __future__ import annotations

from pathlib import Path

from export.checkpoint.argos import ArgosReader
from export.checkpoint.bart import BART, MBART, PEGASUS, FamilyReader
from export.checkpoint.base import SAMPLES_NAME, Checkpoint, CheckpointReader, build_model, with_languages
from export.checkpoint.ctranslate2 import CTranslate2Reader
from export.checkpoint.fairseq import FairseqReader
from export.checkpoint.m2m100 import M2M100
from export.checkpoint.marian import MarianReader
from export.checkpoint.marian_binary import MarianBinaryReader
from export.checkpoint.marian_npz import MarianNpzReader
from export.checkpoint.native import NativeReader, write_native_checkpoint
from export.checkpoint.opennmt_py import OpenNmtPyReader
from export.checkpoint.t5 import T5Reader
from export.checkpoint.torch_transformer import TorchTransformerReader
from export.checkpoint.unknown import unknown_faults
from export.checkpoint.zipped import ZipReader
from serving.errors import CheckpointError

__all__ = ["SAMPLES_NAME", "Checkpoint", "build_model", "read_checkpoint", "with_languages", "write_native_checkpoint"]

_DIRECTORY_READERS: tuple[CheckpointReader, ...] = (
    NativeReader(),
    TorchTransformerReader(),
    MarianReader(),
    ArgosReader(),
    MarianBinaryReader(),
    CTranslate2Reader(),
    *map(FamilyReader, (M2M100, BART, MBART, PEGASUS)),
    T5Reader(),
    # These go by names of files that others may have beside their own, the last most of all.
    MarianNpzReader(),
    FairseqReader(),
    OpenNmtPyReader(),
)
_READERS = (*_DIRECTORY_READERS, ZipReader(_DIRECTORY_READERS))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of any known format.

    Args:
        path: a file or a directory, whichever the format has.

    Raises:
        CheckpointError: the format is not known, or the checkpoint has faults; all of them are named.
    """
    if not path.exists():
        raise CheckpointError(path, ["there is no such file or directory"])
    for reader in _READERS:
        if reader.recognizes(path):
            return reader.read(path)
    raise CheckpointError(path, unknown_faults(path, _READERS))
