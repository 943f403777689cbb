"""Bundles that tests share: a tiny random model, exported once."""

from pathlib import Path

import pytest

from export.pipeline import export_bundle
from serving.bundle import Bundle
from tests.support import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the paper's architecture, 64 words."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session", params=["fp32", "int8"])
def tiny_bundle(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model's bundle, in each precision that runs on a CPU."""
    directory = tmp_path_factory.mktemp("bundles") / request.param
    return export_bundle(tiny_checkpoint, directory, precision=request.param, show_progress=False)


@pytest.fixture(scope="session")
def external_bundle(tiny_bundle: Bundle, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same bundle with its weights in a file of their own, as a large model's are."""
    directory = tmp_path_factory.mktemp("external") / tiny_bundle.manifest.precision
    precision = tiny_bundle.manifest.precision
    return export_bundle(tiny_checkpoint, directory, precision=precision, show_progress=False, largest_embedded_bytes=0)
