"""``model.bin`` as the first versions of CTranslate2 wrote it; what versions of today write, their own converters tell."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

OPENNMT_TF_NAMES = (
    ("embeddings_0/weight", "w_embs"),
    ("embeddings/weight", "w_embs"),
    ("weight", "kernel"),
    ("layer_norm", "LayerNorm"),
    ("projection", "dense"),
    ("linear_0", "conv1d"),
    ("linear_", "conv1d_"),
)


def string(text: str) -> bytes:
    """A string as every version has it."""
    return struct.pack("<H", len(text.encode()) + 1) + text.encode() + b"\0"


def legacy_binary(
    variables: Mapping[str, Any],
    aliases: Mapping[str, str] | None = None,
    *,
    version: int,
    spec: str = "TransformerSpec",
    revision: int = 3,
) -> bytes:
    """A file of binary version 1 (which has neither ``spec`` nor ``revision``), 2 (which has no aliases) or 3."""
    parts = [struct.pack("<I", version)]
    if version >= 2:
        parts += [string(spec), struct.pack("<I", revision)]
    parts.append(struct.pack("<I", len(variables)))
    for name, values in variables.items():
        shape = np.shape(values)
        parts += [string(name), struct.pack("<B", len(shape)), *(struct.pack("<I", length) for length in shape)]
        parts += [struct.pack("<BI", values.itemsize, values.size), values.tobytes()]
    if version >= 3:
        parts.append(struct.pack("<I", len(aliases or {})))
        parts += [string(alias) + string(name) for alias, name in (aliases or {}).items()]
    return b"".join(parts)


def opennmt_tf_name(name: str) -> str:
    """What OpenNMT-tf calls a weight of an encoder or a decoder, and so the first revision."""
    scope, _, _ = name.partition("/")
    attentions = (
        (("self_attention", "multi_head"),)
        if scope == "encoder"
        else (("self_attention", "masked_multi_head"), ("/attention", "/multi_head"))
    )
    for theirs, first in (*OPENNMT_TF_NAMES, *attentions):
        name = name.replace(theirs, first)
    return f"transformer/{name}:0"
