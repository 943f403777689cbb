"""What tests share: a tiny random model, exported once in each way, and graphs, traced once."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from export import pipeline
from export.graph_files import LARGEST_EMBEDDED_BYTES
from export.pipeline import export_bundle
from serving.bundle import Bundle
from serving.manifest import Precision
from tests.support import write_tiny_checkpoint
from tests.traces import Traces

# A bundle of the tiny model: its precision, and the most bytes of weights that its graphs' own files take.
TinyBundles = Callable[[Precision, int], Bundle]


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


@pytest.fixture(scope="session")
def tiny_bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    """Makes each of the tiny model's bundles once, in whatever order tests ask for precisions."""

    @cache
    def export(precision: Precision, largest_embedded_bytes: int) -> Bundle:
        return export_bundle(
            tiny_checkpoint,
            tmp_path_factory.mktemp("bundles") / precision,
            precision=precision,
            show_progress=False,
            largest_embedded_bytes=largest_embedded_bytes,
        )

    return export


@pytest.fixture(scope="session", params=["fp32", "int8"])
def tiny_bundle(request: pytest.FixtureRequest, tiny_bundles: TinyBundles) -> Bundle:
    """The tiny model's bundle, in each precision that runs on a CPU."""
    return tiny_bundles(request.param, LARGEST_EMBEDDED_BYTES)


@pytest.fixture(scope="session")
def external_bundle(tiny_bundle: Bundle, tiny_bundles: TinyBundles) -> Bundle:
    """The same bundle with its weights in a file of their own, as a large model's are."""
    return tiny_bundles(tiny_bundle.manifest.precision, 0)
