"""The root-mean-square norm: ONNX Runtime's operator while tracing, PyTorch's own otherwise.

In the opset of the graphs there is none, and one that the tracer takes apart would be computed in half precision where a graph
is; this one is computed in single precision wherever it runs. Does not know where a model normalizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RmsNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, 2019): without a mean to subtract, and without a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> [..., d_model]."""
        if torch.onnx.is_in_onnx_export():
            assert self.eps is not None
            return torch.onnx.ops.symbolic(
                "SimplifiedLayerNormalization",
                (x, self.weight),
                {"axis": -1, "epsilon": self.eps},
                dtype=x.dtype,
                shape=x.shape,
                version=1,
            )
        return super().forward(x)
