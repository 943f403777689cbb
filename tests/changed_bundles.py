"""Bundles whose files were changed after they were written, with a manifest that lists them as they are now."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import onnx

from serving.bundle import Bundle, read_bundle


def relisted(directory: Path) -> Bundle:
    """The bundle with a manifest that says what its files are now, but for those that are gone."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if (directory / name).exists()}
    for name, entry in manifest["files"].items():
        contents = (directory / name).read_bytes()
        entry.update(sha256=hashlib.sha256(contents).hexdigest(), bytes=len(contents))
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return read_bundle(directory)


def as_older(directory: Path) -> Bundle:
    """Turn a bundle into one as earlier versions wrote it: weights in the graphs' own files, and one decoder."""
    for name in ("encoder.onnx", "decoder.onnx"):
        model = onnx.load(directory / name)
        (directory / name).write_bytes(model.SerializeToString())
    (directory / "weights.data").unlink()
    (directory / "lone_decoder.onnx").unlink()
    return relisted(directory)
