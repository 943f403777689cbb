"""What files of weights have in common: NumPy's archives (``.npz``), torch's pickles (``.pt``, ``.bin``) and what tensors are.

Knows how to read them without running what is in them and without believing sizes that they only claim; does not know what their
contents mean.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from export.checkpoint.packages import size_faults
from export.checkpoint.pickles import check_tuples
from export.checkpoint.stand_ins import COMMON_CLASSES, is_empty, plain_settings, stand_ins

# What an archive of torch's starts with.
_ARCHIVE = b"PK\3\4"
# In a file that is none: two numbers that say what it is, the system that wrote it, the document, and its storages.
_PICKLES = 5


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_npz(path: Path, faults: list[str]) -> dict[str, NDArray[Any]]:
    """The arrays of an archive by name, none of Python objects; none at all after a fault, which goes to ``faults``."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = size_faults(path, archive.infolist())
            for info in archive.infolist() if not found else ():
                with archive.open(info) as stream:
                    fault = _header_fault(stream, info.file_size)
                found += [f"{info.filename}: {fault}"] if fault else []
        if not found:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    # A broken or hostile archive makes zipfile and NumPy raise nearly anything.
    except Exception as error:
        found = [f"cannot be read: {first_line(error)}"]
    faults += [f"{path.name}: {fault}" for fault in found]
    return {}


def read_pickle(path: Path, classes: Iterable[str], conversion: str, faults: list[str]) -> dict[str, Any]:
    """What ``torch.save`` wrote of a dict; empty after a fault, which goes to ``faults``.

    Read with ``weights_only``, which runs no code: beside tensors and plain values only stand-ins are made (``stand_ins.py``).
    Tensors stay in the file until they are looked at, where its form allows that.

    Args:
        path: the file.
        classes: of what there may be objects in it, beside those that any tool may leave there.
        conversion: what to do, where the origin's library is installed, with a file that needs other classes.
        faults: of the whole checkpoint so far.
    """
    try:
        with stand_ins((*COMMON_CLASSES, *classes)):
            document: Any = load_pickle(path)
    # A broken or hostile pickle makes torch raise nearly anything.
    except Exception as error:
        faults.append(f"{path.name}: {_load_fault(error, conversion)}")
        return {}
    if not isinstance(document, dict):
        faults.append(f"{path.name}: holds no dict")
        return {}
    if not document:
        faults.append(f"{path.name}: holds nothing")
    return document


def read_safetensors(path: Path, faults: list[str]) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, which are the file's own pages; none after a fault, which goes to ``faults``."""
    try:
        stored = load_file(path)
    # A broken or hostile file makes the library raise errors of its own, torch's and the system's.
    except Exception as error:
        faults.append(f"{path.name}: cannot be read: {first_line(error)}")
        return {}
    return state_dict(stored, path.name, faults)


def load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote, without running any code; tensors are the file's own pages where its format allows that.

    Raises:
        ValueError: it unpacks to more than any model, or a tuple in it stands for too many values.
        Exception: nearly any, of a file that is broken or hostile.
    """
    is_mapped = False
    if _is_archive(path):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if faults := size_faults(path, members):
                raise ValueError("; ".join(faults))
            # In any case of letters, as torch finds it.
            for info in (info for info in members if info.filename.lower().endswith("data.pkl")):
                check_tuples(BytesIO(archive.read(info)))
            # torch leaves them so; an archive that another tool packed again may not be.
            is_mapped = all(info.compress_type == zipfile.ZIP_STORED for info in members)
    else:
        with path.open("rb") as stream:
            # One after the other, values and names of storages last.
            for _ in range(_PICKLES):
                if not check_tuples(stream):
                    break
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped)


def _is_archive(path: Path) -> bool:
    """As torch tells it: what it would unpack is what has to be looked at before."""
    with path.open("rb") as stream:
        return stream.read(len(_ARCHIVE)) == _ARCHIVE


def weights_of(document: Mapping[str, Any], field: str, file_name: str, faults: list[str]) -> dict[str, Tensor]:
    """The tensors that a document of ``read_pickle`` has under ``field``; none after a fault, which goes to ``faults``."""
    called = f"{file_name}: {field}"
    if is_empty(document.get(field)):
        faults.append(f"{called}: is no state dict")
        return {}
    return state_dict(document.get(field), called, faults)


def state_dict(stored: Any, called: str, faults: list[str]) -> dict[str, Tensor]:
    """The tensors that a file holds, if it holds any and nothing else; none after a fault, which goes to ``faults``.

    Args:
        stored: what was read.
        called: what it is called in faults.
        faults: of the whole checkpoint so far.
    """
    if not isinstance(stored, dict) or not all(isinstance(name, str) for name in stored):
        faults.append(f"{called}: is no state dict")
        return {}
    if not stored:
        faults.append(f"{called}: holds no tensors")
    odd = [f"{called}: {name}: {fault}" for name, tensor in stored.items() if (fault := tensor_fault(tensor))]
    faults += odd
    return {} if odd else dict(stored)


def tensor_fault(tensor: Any) -> str | None:
    """Why what a file holds is no tensor of weights; None when it is one."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "is no dense tensor"
    # One value may stand for any number of them: to look at all of them could take hours.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {list(tensor.shape)}, and fewer values than that are stored"
    return None


def first_line(error: Exception) -> str:
    """What an error says, without the advice that may follow."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def settings_of(stored: Any, called: str, faults: list[str]) -> dict[str, Any] | None:
    """Settings of a document of ``read_pickle``, as plain values; None after a fault, which goes to ``faults``."""
    try:
        settings = plain_settings(stored)
    except ValueError as error:
        faults.append(f"{called}: {error}")
        return None
    if settings is None:
        faults.append(f"{called}: holds no settings")
    return settings


def _header_fault(stream: IO[bytes], size_bytes: int) -> str | None:
    """Why an archive's member is no array of numbers that is as large as it says; None when it is."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        version = np.lib.format.read_magic(stream)
        if version not in read_header:
            return f"is of version {version} of NumPy's format, which is not supported"
        shape, _, dtype = read_header[version](stream)
    except ValueError as error:
        return f"is no array: {first_line(error)}"
    if dtype.hasobject:
        return "holds Python objects, which are not read"
    claimed_bytes = dtype.itemsize
    for length in shape:
        claimed_bytes *= length
    if stream.tell() + claimed_bytes != size_bytes:
        return f"has shape {list(shape)}, and other than so many values are stored"
    return None


def _load_fault(error: Exception, conversion: str) -> str:
    # torch tells what it refused at the end of a page of advice.
    if refused := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"needs {refused[1]}, which is not loaded since a pickle may run any code; {conversion}"
    if reason := re.search(r"WeightsUnpickler error: (.*)", str(error)):
        return f"cannot be read: {reason[1]}"
    return f"cannot be read: {first_line(error)}"
