"""``model.bin`` of CTranslate2: variables by name, of several types, and other names for some of them.

Knows the file's layout (binary versions 1 to 6) and how its quantized weights become numbers again; does not know what the
variables mean (``ctranslate2.py``). Little-endian throughout, one after the other:

- binary version, uint32; name of the specification, string; its revision, uint32;
- number of variables, uint32; of each: name, string; rank, uint8; dimensions, uint32 each; type, uint8 (an index of ``_DTYPES``);
  bytes, uint32; that many bytes, row by row;
- number of aliases, uint32; of each: alias and the variable's name, strings.

Version 1 has no specification, versions before 3 no aliases. Before version 4 the type is the bytes of one value (``_WIDTHS``),
and what follows it is the number of values.

A string is its length with the final zero, uint16, then its bytes and the zero. A weight of int8 has one scale a row in the
variable ``NAME_scale``, one of int16 a single scale there: value = integer / scale. An alias of a weight is one of its scale too.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BINARY_VERSIONS = range(1, 7)
# The first ones that have these.
_SPEC_VERSION, _ALIASES_VERSION, _TYPES_VERSION = 2, 3, 4
# What a file without a specification is of: no name, and the first revision.
_FIRST_SPEC = ("", 1)

# By the type's number in the file; bfloat16 is read as bits.
_DTYPES: tuple[tuple[str, type[np.generic]], ...] = (
    ("float32", np.float32),
    ("int8", np.int8),
    ("int16", np.int16),
    ("int32", np.int32),
    ("float16", np.float16),
    ("bfloat16", np.int16),
)
# By the bytes of a value, in files that do not state types.
_WIDTHS = {4: _DTYPES[0], 1: _DTYPES[1], 2: _DTYPES[2]}
_SCALE = "_scale"
# The scale of int16 weights of old models, which do not have it in the file.
_INT16_SCALE = 1000.0
# More dimensions than any variable has.
_MAX_RANK = 8


@dataclass(frozen=True, slots=True)
class Variable:
    """Where one is in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class ModelBinary:
    """An opened file; values are read from it when they are asked for."""

    spec: str
    spec_revision: int
    version: int
    sha256: str
    variables: Mapping[str, Variable]
    # Alias -> variable.
    aliases: Mapping[str, str]
    _contents: mmap.mmap

    @property
    def names(self) -> list[str]:
        """Of all variables and aliases."""
        return [*self.variables, *self.aliases]

    def __contains__(self, name: str) -> bool:
        """Whether there is such a variable or alias."""
        return name in self.variables or name in self.aliases

    def stored_name(self, name: str) -> str | None:
        """The variable that ``name`` stands for; None when there is none."""
        own = self.aliases.get(name, name)
        return own if own in self.variables else None

    def scalar(self, name: str) -> float | int | None:
        """A setting; None when there is none, or when it is no single number."""
        own = self.stored_name(name)
        if own is None or self.variables[own].shape:
            return None
        value: float | int = self._tensor(self.variables[own]).item()
        return value

    def text(self, name: str) -> str | None:
        """A setting that is a string, stored as its bytes; None when there is none.

        Raises:
            ValueError: it is no text.
        """
        own = self.stored_name(name)
        if own is None:
            return None
        values = self._tensor(self.variables[own])
        if values.dtype != torch.int8 or values.dim() != 1:
            raise ValueError(f"{name}: is no text")
        try:
            return values.numpy().tobytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: is no text: {error}") from error

    def weight(self, name: str) -> Tensor:
        """A matrix or vector as float32, quantized ones multiplied out.

        Raises:
            KeyError: there is none.
            ValueError: it is quantized, and its scales are missing or of another number.
        """
        own = self.aliases.get(name, name)
        variable = self.variables[own]
        values = self._tensor(variable)
        if variable.dtype in ("float32", "float16", "bfloat16"):
            return values.to(torch.float32)
        if variable.dtype not in ("int8", "int16"):
            raise ValueError(f"{own}: a weight of type {variable.dtype} is not supported")
        scale = self.variables.get(own + _SCALE)
        if scale is None and variable.dtype == "int8":
            raise ValueError(f"{own}{_SCALE}: is missing, and {own} is quantized")
        if scale is None:
            return values.to(torch.float32) / _INT16_SCALE
        if scale.shape not in ((), (1,), variable.shape[:1]):
            raise ValueError(f"{own}{_SCALE}: shape {list(scale.shape)}, expected one number or {list(variable.shape[:1])}")
        scales = self._tensor(scale).to(torch.float32).reshape(-1, *(1,) * (values.dim() - 1))
        return values.to(torch.float32) / scales

    def _tensor(self, variable: Variable) -> Tensor:
        """A copy of the values, as they are stored."""
        element = dict(_DTYPES)[variable.dtype]
        count = math.prod(variable.shape)
        values = np.frombuffer(self._contents, element, count, variable.offset).reshape(variable.shape)
        tensor = torch.from_numpy(values.copy())
        return tensor.view(torch.bfloat16) if variable.dtype == "bfloat16" else tensor


def read_binary(path: Path) -> ModelBinary:
    """Open a file; everything but the values is read and checked.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, of an unknown version, or ends too early or too late; says which.
    """
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        if stream.tell() == 0:
            raise ValueError("is empty")
        contents = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(contents)
    version = cursor.number("I")
    if version not in BINARY_VERSIONS:
        raise ValueError(
            f"binary version {version} is not supported, only {BINARY_VERSIONS.start} to {BINARY_VERSIONS.stop - 1}; "
            "or it is no model of CTranslate2"
        )
    spec, spec_revision = (cursor.string(), cursor.number("I")) if version >= _SPEC_VERSION else _FIRST_SPEC
    variables: dict[str, Variable] = {}
    for _ in range(cursor.number("I")):
        name = cursor.string()
        if name in variables:
            raise ValueError(f"{name}: is there twice")
        variables[name] = cursor.variable(name, states_type=version >= _TYPES_VERSION)
    num_aliases = cursor.number("I") if version >= _ALIASES_VERSION else 0
    aliases = {cursor.string(): cursor.string() for _ in range(num_aliases)}
    if cursor.offset != len(contents):
        raise ValueError(f"ends with {len(contents) - cursor.offset} bytes that belong to nothing")
    dangling = sorted(alias for alias, own in aliases.items() if own not in variables)
    if dangling:
        raise ValueError(f"{', '.join(dangling[:3])}: stands for a variable that is not there")
    return ModelBinary(spec, spec_revision, version, sha256, variables, aliases, contents)


class _Cursor:
    """A place in the file, and what can be read from there."""

    def __init__(self, contents: mmap.mmap) -> None:
        self._contents = contents
        self.offset = 0

    def number(self, code: str) -> int:
        """An integer of this ``struct`` code."""
        start = self._take(struct.calcsize(f"<{code}"), "a number")
        value: int = struct.unpack_from(f"<{code}", self._contents, start)[0]
        return value

    def string(self) -> str:
        """A string, without its final zero."""
        length = self.number("H")
        start = self._take(length, "a string")
        encoded = self._contents[start : self.offset]
        if not encoded.endswith(b"\0"):
            raise ValueError(f"a string at byte {start} does not end in zero")
        try:
            return encoded[:-1].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"a string at byte {start} is no text: {error}") from error

    def variable(self, name: str, *, states_type: bool) -> Variable:
        """What follows a variable's name, its type or only the width of a value; its values are skipped."""
        rank = self.number("B")
        if rank > _MAX_RANK:
            raise ValueError(f"{name}: has {rank} dimensions")
        shape = tuple(self.number("I") for _ in range(rank))
        kind = self.number("B")
        if states_type and kind >= len(_DTYPES):
            raise ValueError(f"{name}: of a type with the number {kind}, which is not known")
        if not states_type and kind not in _WIDTHS:
            raise ValueError(f"{name}: of values of {kind} bytes, which are of no known type")
        dtype, element = _DTYPES[kind] if states_type else _WIDTHS[kind]
        stated, needed = self.number("I") * (1 if states_type else kind), math.prod(shape) * np.dtype(element).itemsize
        if stated != needed:
            raise ValueError(f"{name}: of {stated} bytes, but {dtype} of shape {list(shape)} takes {needed}")
        return Variable(dtype, shape, self._take(stated, f"the values of {name}"))

    def _take(self, length: int, what: str) -> int:
        """Where the next bytes are; the place moves on behind them."""
        start, end = self.offset, self.offset + length
        if end > len(self._contents):
            raise ValueError(f"ends within {what}, at byte {len(self._contents)}")
        self.offset = end
        return start
