"""The runtime's own operators against the PyTorch that they stand for, row by row."""

from __future__ import annotations

from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.model import Activation, activate
from export.norms import RmsNorm
from export.onnx_export import OPSET, _quiet
from export.operators import activation
from serving.runtime import load_graph

WIDTH = 48


class Activated(nn.Module):
    """One activation."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.name: Activation = name

    def forward(self, x: Tensor) -> Tensor:
        return activation(x, self.name)


def traced(module: nn.Module) -> bytes:
    with _quiet():
        program = torch.onnx.export(
            module.eval(),
            (torch.randn(3, 5, WIDTH),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},),
            opset_version=OPSET,
            input_names=["x"],
            output_names=["y"],
            verbose=False,
        )
    assert program is not None
    graph: bytes = program.model_proto.SerializeToString()
    return graph


def run(session: ort.InferenceSession, x: Tensor) -> NDArray[np.float32]:
    y: NDArray[np.float32] = session.run(["y"], {"x": x.numpy()})[0]
    return y


def assert_neighbours_change_nothing(session: ort.InferenceSession) -> None:
    x = 4 * torch.randn(5, 7, WIDTH)
    together = run(session, x)
    for i in range(5):
        assert np.array_equal(run(session, x[i : i + 1])[0], together[i])
        assert np.array_equal(run(session, x[i : i + 1, :3])[0], together[i, :3])


@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_is_one_operator_that_knows_no_neighbours(name: Activation) -> None:
    torch.manual_seed(0)
    graph = traced(Activated(name))
    assert len(onnx.load_from_string(graph).graph.node) == 1
    session, x = load_graph(graph), 4 * torch.randn(2, 6, WIDTH)
    # The runtime's tanh and exp are approximations of their own.
    np.testing.assert_allclose(run(session, x), activate(x, name), atol=3e-6)
    assert_neighbours_change_nothing(session)


def test_a_norm_is_one_operator_that_knows_no_neighbours() -> None:
    torch.manual_seed(0)
    norm = RmsNorm(WIDTH, eps=1e-6)
    norm.weight.data.normal_()
    graph = traced(norm)
    assert [node.op_type for node in onnx.load_from_string(graph).graph.node] == ["SimplifiedLayerNormalization"]
    session, x = load_graph(graph), 4 * torch.randn(2, 6, WIDTH)
    expected = x / (x.square().mean(dim=2, keepdim=True) + 1e-6).sqrt() * norm.weight.detach()
    np.testing.assert_allclose(run(session, x), expected, atol=1e-5)
    np.testing.assert_allclose(norm(x).detach(), expected, atol=1e-5)
    assert_neighbours_change_nothing(session)
