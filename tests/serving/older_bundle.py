"""A bundle as earlier versions wrote it: weights in the graphs' own files, and one decoder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx

from serving.bundle import Bundle, read_bundle


def relisted(directory: Path) -> Bundle:
    """The bundle with a manifest that says what its files are now: a hostile one, where they were changed."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if (directory / name).exists()}
    for name, entry in manifest["files"].items():
        contents = (directory / name).read_bytes()
        entry.update(sha256=hashlib.sha256(contents).hexdigest(), bytes=len(contents))
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return read_bundle(directory)


def as_older(directory: Path) -> Bundle:
    """Turn a bundle into such a one."""
    for name in ("encoder.onnx", "decoder.onnx"):
        model = onnx.load(directory / name)
        (directory / name).write_bytes(model.SerializeToString())
    (directory / "weights.data").unlink()
    (directory / "lone_decoder.onnx").unlink()
    return relisted(directory)
