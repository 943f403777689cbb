"""Activations of the graphs: ONNX Runtime's own operators while tracing, plain PyTorch otherwise.

An activation that the tracer takes apart costs a pass over memory for each of up to eight operators; these are one. Each computes
an element by itself. Does not know attention (``attention.py``) or what is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from export.attention import CONTRIB_DOMAIN
from export.model import GELU_SIGMOID_RATE, Activation, activate

# What is not here is a standard operator already.
_OPERATORS: Mapping[Activation, str] = {
    "gelu": "Gelu",
    "gelu_tanh": "FastGelu",
    "gelu_sigmoid": "QuickGelu",
    "silu": "QuickGelu",
}
# Of QuickGelu, x * sigmoid(alpha x).
_ALPHA: Mapping[Activation, float] = {"gelu_sigmoid": GELU_SIGMOID_RATE, "silu": 1.0}


def activation(x: Tensor, name: Activation) -> Tensor:
    """``activate`` of ``model.py``, as an operator of a graph that is being traced."""
    if name not in _OPERATORS or not torch.onnx.is_in_onnx_export():
        return activate(x, name)
    return torch.onnx.ops.symbolic(
        f"{CONTRIB_DOMAIN}::{_OPERATORS[name]}",
        (x,),
        {"alpha": _ALPHA[name]} if name in _ALPHA else {},
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )
