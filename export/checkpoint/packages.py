"""Zip archives that models come in: how one that may come from anywhere is unpacked.

Knows what an archive must not do (write outside of its directory, fill the disk, hold links) and refuses it before a byte is
written; does not know what is in it.
"""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from export.checkpoint.base import Checkpoint
from serving.errors import CheckpointError

# Weights hardly compress. An archive that unpacks to many times its size is none of a model, and could fill disk and memory.
_MOST_UNPACKED = 20
_UNPACKED_ANYWAY_BYTES = 2**24
# Real ones have some dozens.
_MOST_MEMBERS = 10_000
_MOST_FAULTS = 20

# From the names of an archive's files to where they go, by what they are called in the archive; what is left out stays there.
Places = Callable[[Sequence[PurePosixPath]], dict[PurePosixPath, PurePosixPath]]


@contextmanager
def unpacked(path: Path, places: Places) -> Iterator[Path]:
    """A directory with the files of an archive, which is removed in the end.

    Args:
        path: the archive.
        places: which files are wanted, and where; raises ValueError where there is none.

    Raises:
        CheckpointError: it is no zip archive, or one that could write or fill what it should not; nothing was unpacked then.
    """
    with tempfile.TemporaryDirectory(prefix="onnxlate-") as name:
        _unpack(path, Path(name), places)
        yield Path(name)


def within_one_directory(names: Sequence[PurePosixPath]) -> dict[PurePosixPath, PurePosixPath]:
    """All files, without the one directory that may be around them."""
    # What macOS adds to archives.
    own = [name for name in names if name.parts[0] != "__MACOSX"]
    tops = {name.parts[0] if len(name.parts) > 1 else None for name in own}
    depth = 1 if len(tops) == 1 and None not in tops else 0
    return {name: PurePosixPath(*name.parts[depth:]) for name in own}


def detached(checkpoint: Checkpoint) -> Checkpoint:
    """The same without a directory that goes: its tokenizer's files are read."""
    files = checkpoint.tokenizer_files.items()
    return replace(checkpoint, tokenizer_files={name: _contents(file) for name, file in files})


def size_faults(path: Path, members: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Why no file of an archive must be read: names that are there twice, or more bytes than it can hold of a model."""
    names = Counter(info.filename for info in members)
    packed_bytes, unpacked_bytes = path.stat().st_size, sum(info.file_size for info in members)
    faults = [f"{name}: is there {number} times" for name, number in names.items() if number > 1]
    if unpacked_bytes > max(_MOST_UNPACKED * packed_bytes, _UNPACKED_ANYWAY_BYTES):
        faults.append(f"unpacks to {unpacked_bytes} bytes, and is itself of {packed_bytes}; no model does that")
    if len(members) > _MOST_MEMBERS:
        faults.append(f"has {len(members)} members; no model has")
    return faults[:_MOST_FAULTS]


def _unpack(path: Path, directory: Path, places: Places) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            faults = [f"{info.filename!r}: {fault}" for info in members if (fault := _member_fault(info))]
            if faults := [*faults, *size_faults(path, members)]:
                raise CheckpointError(path, faults[:_MOST_FAULTS])
            infos = {PurePosixPath(info.filename): info for info in members if not info.is_dir()}
            try:
                wanted = places(list(infos))
            except ValueError as error:
                raise CheckpointError(path, [str(error)]) from error
            for name, place in wanted.items():
                destination = directory / place
                destination.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(infos[name]) as source, destination.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except CheckpointError:
        raise
    # A broken archive makes zipfile and the decompressors raise nearly anything.
    except Exception as error:
        raise CheckpointError(path, [f"cannot be unpacked: {error or type(error).__name__}"]) from error


def _member_fault(info: zipfile.ZipInfo) -> str | None:
    """Why a member must not be unpacked; None when it may."""
    path = PurePosixPath(info.filename)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in info.filename or ":" in info.filename:
        return "is no name within the archive; nothing outside is written"
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is no file; links are not followed"
    if info.flag_bits & 1:
        return "is encrypted"
    return None


def _contents(file: Path | bytes) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file
