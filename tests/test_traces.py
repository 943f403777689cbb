"""When two exports share a trace, and when not."""

from __future__ import annotations

from typing import Any

import pytest

from export.calibration import calibrated_graphs
from export.graphs import lay_out
from export.samples import Sample
from export.verify import make_references
from tests.support import T5, tiny_config, tiny_model
from tests.traces import fingerprint


def fingerprints(*, seed: int = 0, **settings: Any) -> list[str]:
    return [fingerprint(graph) for graph in lay_out(tiny_model(tiny_config(**settings), seed=seed))]


def test_the_same_model_has_the_same_graphs() -> None:
    assert fingerprints() == fingerprints()
    assert fingerprints(**T5) == fingerprints(**T5)


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"num_heads": 1}, {"activation": "gelu"}, {"norm": "pre"}, {"layer_norm_eps": 1e-3}, {"bias": False}],
    ids=str,
)
def test_another_model_has_other_graphs(settings: dict[str, Any]) -> None:
    assert all(one != other for one, other in zip(fingerprints(), fingerprints(**settings), strict=True))


def test_each_precision_and_each_device_has_graphs_of_its_own() -> None:
    model = tiny_model()
    calibrated = calibrated_graphs(model, make_references(model, [Sample((5, 9, 3))]))
    _, for_cuda = lay_out(model, device="cuda")
    halves = lay_out(tiny_model().half(), device="cuda")
    decoders = [fingerprint(decoder) for decoder in (lay_out(model)[1], calibrated[1], for_cuda, halves[1])]
    assert len(set(decoders)) == len(decoders)
