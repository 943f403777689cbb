"""Writing a bundle: whole, or not at all.

Knows files, hashes and renames; does not know graphs, precision or what the manifest says.

Everything is written to a hidden directory beside the destination, synced, and renamed into place, the manifest last. Whatever
stops the export, a full disk or a kill, the destination is as it was before. A killed export leaves its hidden directory; the
next export to the same place removes it. The hidden directory is locked while its export runs, and a lock ends with its process,
so that of two exports at once neither takes the other's for a leftover.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from serving.bundle import Bundle, read_bundle
from serving.errors import BundleError, ExportError
from serving.manifest import MANIFEST_NAME, FileEntry, Manifest, ManifestDraft, manifest_faults

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Owned:
    """A file in a working directory, which becomes the bundle's own: it is renamed, where another would be copied."""

    path: Path


def write_bundle(
    directory: Path, files: Mapping[str, bytes | Path | Owned], manifest: ManifestDraft, *, overwrite: bool = False
) -> Bundle:
    """Write a bundle; on any error, and on a kill, nothing of it is left at ``directory``.

    Args:
        directory: the bundle's place; its parents are made when they are missing, and stay if it is written.
        files: contents, or the file to copy or to take, by name in the bundle; without the manifest.
        manifest: the rest of the manifest.
        overwrite: replace the bundle that is there, whole; it stays until the new one is complete on disk.

    Raises:
        ExportError: the destination is taken, the manifest does not fit the files, or a file cannot be written.
    """
    place = Path(os.path.realpath(directory))
    try:
        _clear_up(place)
        check_destination(directory, overwrite=overwrite)
        if faults := manifest_faults(manifest, files):
            raise ExportError("\n  ".join(["the bundle would be unusable:", *faults]))
        with _parents(place), _partial_directory(place) as partial:
            entries = {name: _write(partial / name, contents) for name, contents in files.items()}
            text = Manifest.model_validate({**dict(manifest), "files": entries}).model_dump_json(indent=2) + "\n"
            # As a reader has it, whose version is of every field that stands there.
            complete = Manifest.model_validate_json(text)
            _write(partial / MANIFEST_NAME, text.encode())
            _sync_directory(partial)
            _move_into_place(partial, place, overwrite=overwrite)
    except OSError as error:
        raise ExportError(f"bundle {directory} could not be written: {error}") from error
    return Bundle(directory, complete)


def check_destination(directory: Path, *, overwrite: bool = False) -> None:
    """Refuse a destination that ``write_bundle`` would refuse, before an export does its work.

    A link to a bundle is followed: the link stays, and what it leads to is replaced.

    Raises:
        ExportError: something is there, and it is not a bundle or ``overwrite`` is false.
    """
    try:
        exists, is_bundle = directory.exists(), (directory / MANIFEST_NAME).is_file()
    except OSError as error:
        raise ExportError(f"bundle {directory} could not be written: {error}") from error
    if exists and not is_bundle:
        raise ExportError(f"{directory} exists and is not a bundle; it is left alone")
    if exists and not overwrite:
        raise ExportError(f"{directory} exists; --overwrite replaces it")


@contextmanager
def working_directory(directory: Path) -> Iterator[Path]:
    """A place for an export's own files, beside the bundle that it makes at ``directory``; gone afterwards.

    Raises:
        ExportError: it cannot be made.
    """
    with ExitStack() as stack:
        try:
            place = Path(os.path.realpath(directory))
            _clear_up(place)
            stack.enter_context(_parents(place))
            working = stack.enter_context(_partial_directory(place))
        except OSError as error:
            raise ExportError(f"bundle {directory} could not be written: {error}") from error
        yield working


@contextmanager
def _parents(place: Path) -> Iterator[None]:
    """The directories that ``place`` is in; those that had to be made are gone afterwards, where nothing came into them."""
    missing = [parent for parent in place.parents if not parent.exists()]  # the innermost first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # a bundle is there, or it was never made
                parent.rmdir()


@contextmanager
def _partial_directory(place: Path) -> Iterator[Path]:
    """A locked hidden directory beside ``place``; gone afterwards, unless it was renamed."""
    partial = place.parent / f"{_partial_prefix(place)}{secrets.token_hex(4)}"
    partial.mkdir()  # with the umask's rights: the one who serves may be another than the one who exports
    try:
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # a file system without locks: then nobody can lock, and so nobody removes, a leftover
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield partial
        finally:
            os.close(lock)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear_up(place: Path) -> None:
    """Mend what a killed export left: put back a bundle that was moved aside, remove what nobody works on any more."""
    for aside in _siblings(place, _aside_prefix(place)):
        if not place.exists() and _is_whole(aside):
            os.rename(aside, place)
        else:
            shutil.rmtree(aside, ignore_errors=True)
    for partial in _siblings(place, _partial_prefix(place)):
        with suppress(OSError):  # gone by now, or locked: another export is at work on it
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                os.close(lock)


def _is_whole(directory: Path) -> bool:
    try:
        read_bundle(directory)
    except BundleError:
        return False
    return True


def _move_into_place(partial: Path, place: Path, *, overwrite: bool) -> None:
    """Rename, with the bundle that is there moved aside meanwhile and back again should the second rename fail."""
    aside = place.parent / f"{_aside_prefix(place)}{secrets.token_hex(4)}"
    try:
        if overwrite and place.exists():
            os.rename(place, aside)
        os.rename(partial, place)  # refused when a bundle came there in the meantime
    except BaseException:
        if aside.exists() and not place.exists():
            os.rename(aside, place)
        raise
    _sync_directory(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _siblings(place: Path, prefix: str) -> list[Path]:
    if not place.parent.is_dir():
        return []
    return [path for path in place.parent.iterdir() if path.name.startswith(prefix)]


def _partial_prefix(place: Path) -> str:
    return f".{place.name}.partial-"


def _aside_prefix(place: Path) -> str:
    return f".{place.name}.replaced-"


def _write(path: Path, contents: bytes | Path | Owned) -> FileEntry:
    """Write one file through to the disk, hashing what is written."""
    if isinstance(contents, Owned):
        with contents.path.open("rb") as source:
            entry = FileEntry(sha256=hashlib.file_digest(source, "sha256").hexdigest(), bytes=source.tell())
            os.fsync(source.fileno())
        os.rename(contents.path, path)
        return entry
    digest = hashlib.sha256()
    size = 0
    with BytesIO(contents) if isinstance(contents, bytes) else contents.open("rb") as source, path.open("xb") as target:
        while chunk := source.read(_CHUNK_BYTES):
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return FileEntry(sha256=digest.hexdigest(), bytes=size)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)
