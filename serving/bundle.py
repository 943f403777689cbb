"""The bundle: a directory that was checked before any of it is used.

A bundle is a directory with ``manifest.json``, ``encoder.onnx``, ``decoder.onnx``, the tokenizer's files, and as a rule a file of
the graphs' weights, which ``runtime/external_data.py`` lets them refer to, and a third graph: ``lone_decoder.onnx`` or
``cache_rows.onnx``. Knows how its files are checked; does not know what the manifest says of them (``manifest.py``), how graphs
are run, or how a bundle is written (``export/writer.py``).

A bundle may come from anywhere: no symbolic link is followed, no name may lead out of the directory, and every listed file must
have the size and hash that the manifest states. Files that the manifest does not list are nobody's business.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import from_json

from serving.errors import BundleError
from serving.manifest import (
    CACHE_ROWS_NAME,
    DECODER_NAME,
    ENCODER_NAME,
    LONE_DECODER_NAME,
    MANIFEST_NAME,
    SUPPORTED_REVISIONS,
    FileEntry,
    Manifest,
    field_faults,
    manifest_faults,
    name_fault,
    revision_fault,
)


@dataclass(frozen=True, slots=True)
class Bundle:
    """A directory that was checked, and its manifest."""

    directory: Path
    manifest: Manifest

    @property
    def encoder_path(self) -> Path:
        """The encoder's graph."""
        return self.path(ENCODER_NAME)

    @property
    def decoder_path(self) -> Path:
        """The decoder step's graph."""
        return self.path(DECODER_NAME)

    @property
    def lone_decoder_path(self) -> Path | None:
        """The same step for sources of one hypothesis each, without branches, if the bundle has it."""
        return self.path(LONE_DECODER_NAME) if LONE_DECODER_NAME in self.manifest.files else None

    @property
    def cache_rows_path(self) -> Path:
        """The graph that moves rows of the caches on a device."""
        return self.path(CACHE_ROWS_NAME)

    def path(self, name: str) -> Path:
        """The file that the manifest lists as ``name``."""
        return self.directory / name


def read_bundle(directory: Path) -> Bundle:
    """Read and check a bundle; every file is hashed.

    Raises:
        BundleError: with every fault. Files are looked at only when the manifest itself can be read.
    """
    if not directory.is_dir():
        raise BundleError(directory, ["there is no such directory"])
    try:
        with _open(directory / MANIFEST_NAME) as stream:
            raw = from_json(stream.read())
    except OSError as error:
        raise BundleError(directory, [f"{MANIFEST_NAME}: {_reason(error)}"]) from error
    except ValueError as error:
        raise BundleError(directory, [f"{MANIFEST_NAME}: is not JSON: {error}"]) from error
    if fault := revision_fault(raw, SUPPORTED_REVISIONS, "export the checkpoint again with this version of onnxlate"):
        raise BundleError(directory, [f"{MANIFEST_NAME}: {fault}"])
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError(directory, [f"{MANIFEST_NAME}: {fault}" for fault in field_faults(error.errors())]) from error

    faults = manifest_faults(manifest, manifest.files)
    for name, entry in manifest.files.items():
        if name_fault(name) is None:
            faults += _file_faults(directory / name, entry)
    if faults:
        raise BundleError(directory, faults)
    return Bundle(directory, manifest)


def _file_faults(path: Path, entry: FileEntry) -> list[str]:
    try:
        with _open(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size != entry.bytes:
                return [f"{path.name}: has {size} bytes instead of {entry.bytes}"]
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                return [f"{path.name}: its contents have changed (SHA-256 differs)"]
    except OSError as error:
        return [f"{path.name}: {_reason(error)}"]
    return []


def _open(path: Path) -> io.BufferedReader:
    """Open a regular file, no link; without waiting, should it be a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.ENOENT:
            return "is missing"
        case errno.ELOOP:
            return "is a symbolic link; none is followed"
        case _:
            return error.strerror or str(error)
