"""What tests share: a tiny random model, exported once in each way, and graphs, traced once."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from export import pipeline
from export.pipeline import export_bundle
from serving.bundle import Bundle
from tests.support import write_tiny_checkpoint
from tests.traces import Traces


@pytest.fixture(scope="session", autouse=True)
def traces() -> Iterator[None]:
    """No export traces a graph that another one has traced already; ``export.onnx_export`` itself is as it was."""
    made = Traces()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "export_encoder", made.encoder)
        patch.setattr(pipeline, "export_decoder", made.decoder)
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the paper's architecture, 64 words."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session", params=["fp32", "int8"])
def tiny_bundle(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny model's bundle, in each precision that runs on a CPU."""
    place = tmp_path_factory.mktemp("bundles") / request.param
    return export_bundle(tiny_checkpoint, place, precision=request.param, show_progress=False)
