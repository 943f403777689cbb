"""Export in half precision, as far as a machine without a CUDA device can tell: there the runtime computes it by casting."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export import verify
from export.model import ModelConfig
from export.pipeline import export_bundle
from serving.bundle import Bundle, read_bundle
from serving.errors import ExportError
from serving.manifest import manifest_faults
from tests.support import T5, tiny_config, write_tiny_checkpoint

# Versions of the operators for which ONNX Runtime has CUDA kernels of the types in these graphs (its docs/OperatorKernels.md).
# A kernel whose range is open fits its first version alone (If's is from 13 to 18); an operator of another version is run on the
# CPU, with copies.
CUDA_KERNELS: dict[str, set[int]] = {
    **{name: {13} for name in ("Concat", "Equal", "Expand", "Gather", "GatherElements", "Less", "LogSoftmax", "MatMul", "Mod")},
    **{name: {13} for name in ("Neg", "Slice", "Softmax")},
    **{name: {14} for name in ("Add", "Div", "Mul", "Relu", "Sub")},
    **{name: {13, 21} for name in ("Squeeze", "Transpose", "Unsqueeze")},
    **{name: {16} for name in ("GreaterOrEqual", "If", "Where")},
    "And": {7},
    "Clip": {13},
    "Cast": {13, 19, 21},
    "LayerNormalization": {17},
    "Pad": {18},
    "Range": {11},
    "ReduceMax": {18},
    "Reshape": {14, 19, 21},
    "Shape": {15, 19, 21},
    "Split": {18},
    "TopK": {11},
}
CUDA_KERNELS_OF_MICROSOFT = {"FastGelu", "GroupQueryAttention", "MultiHeadAttention"}
# The runtime's own operators that are in no domain of its own.
CUDA_KERNELS_OF_THE_RUNTIME = {"SimplifiedLayerNormalization"}


@pytest.fixture(scope="module", params=["paper", "gated"])
def exported(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose fp16 graphs were compared with the model, on the CPU in place of a CUDA device."""
    stepper = verify.onnx_stepper

    def on_cpu(config: ModelConfig, encoder: bytes, decoder: bytes, *, name: str, device: str = "cpu") -> verify.Stepper:
        return stepper(config, encoder, decoder, name=name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "onnx_stepper", on_cpu)
        work = tmp_path_factory.mktemp("fp16")
        # T5's norms and networks; its positions have no kernel.
        gated = tiny_config(**{**T5, "positions": "sinusoidal"})
        checkpoint = tiny_checkpoint if request.param == "paper" else write_tiny_checkpoint(work / "gated", gated)
        return export_bundle(checkpoint, work / "bundle", precision="fp16", show_progress=False)


def test_relative_positions_are_refused(tmp_path: Path) -> None:
    """The operator's kernel for CUDA refuses the bias that they are, as soon as it runs."""
    checkpoint = write_tiny_checkpoint(tmp_path / "t5", tiny_config(**T5))
    with pytest.raises(ExportError, match=r"^precision: fp16 is for CUDA, .* takes no relative positions"):
        export_bundle(checkpoint, tmp_path / "bundle", precision="fp16", show_progress=False)
    assert not (tmp_path / "bundle").exists()


def element_types(values: object) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in values}  # type: ignore[attr-defined]  # repeated messages


def test_caches_are_half_and_logits_are_not(exported: Bundle) -> None:
    graph = onnx.load(exported.decoder_path).graph
    inputs, outputs = element_types(graph.input), element_types(graph.output)
    assert {inputs[name] for name in inputs if "cache" in name} == {TensorProto.FLOAT16}
    assert {outputs[name] for name in outputs if "cache" in name} == {TensorProto.FLOAT16}
    assert outputs["logits"] == outputs["candidate_log_probs"] == TensorProto.FLOAT
    (normalized,) = [node for node in graph.node if node.op_type == "LogSoftmax"]
    assert element_types(graph.value_info)[normalized.output[0]] == TensorProto.FLOAT


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, of its branches too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def test_every_operator_has_a_cuda_kernel(exported: Bundle) -> None:
    for path in (exported.encoder_path, exported.decoder_path, exported.cache_rows_path):
        model = onnx.load(path)
        (opset,) = [entry.version for entry in model.opset_import if entry.domain == ""]
        for node in nodes(model.graph):
            if node.domain == "com.microsoft":
                assert node.op_type in CUDA_KERNELS_OF_MICROSOFT
            elif node.op_type not in CUDA_KERNELS_OF_THE_RUNTIME:
                version = onnx.defs.get_schema(node.op_type, opset, "").since_version
                assert version in CUDA_KERNELS[node.op_type], f"{node.op_type} of opset {version}"


def test_no_constant_overflows(exported: Bundle) -> None:
    for path in (exported.encoder_path, exported.decoder_path):
        for initializer in onnx.load(path).graph.initializer:
            assert np.isfinite(numpy_helper.to_array(initializer)).all(), initializer.name


def test_the_certificate_says_how_far_it_is(exported: Bundle) -> None:
    comparison = read_bundle(exported.directory).manifest.certificate.comparisons["onnx_fp16"]
    assert 0 < comparison.max_abs_logit_difference < 0.05
    assert comparison.token_agreement > 0.95
    assert comparison.tolerance is None


def test_a_bundle_of_fp16_needs_the_graph_that_moves_rows(exported: Bundle) -> None:
    names = set(exported.manifest.files)
    assert manifest_faults(exported.manifest, names) == []
    assert manifest_faults(exported.manifest, names - {"cache_rows.onnx"}) == [
        "cache_rows.onnx: needed, and not among the bundle's files"
    ]


def test_without_a_cuda_device_the_certificate_is_silent_and_the_export_says_why(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", precision="fp16", show_progress=False)
    assert set(bundle.manifest.certificate.comparisons) == {"cached_pytorch", "onnx_fp32"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fp16 was not verified here")
    assert "offers CPUExecutionProvider" in line


def test_a_destination_that_is_taken_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        export_bundle(tmp_path / "no checkpoint", tmp_path / "taken")
