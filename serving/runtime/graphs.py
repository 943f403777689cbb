"""Graphs on ONNX Runtime: loading one onto a device, and running it.

Knows devices, threads and the runtime's options; does not know what a graph means.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime as ort

from serving.bundle import Bundle
from serving.errors import BundleError, EngineError, ServerStartError
from serving.runtime.external_data import external_data_faults

_SPIN_US = 50
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_graph(
    graph: Path | bytes, *, device: str = "cpu", threads: int = 1, tiled_attention: bool = True
) -> ort.InferenceSession:
    """A graph as serving runs it.

    Args:
        graph: a file, or the serialized model.
        device: "cpu" or "cuda".
        threads: CPU threads of one call; 1 runs it on the caller's.
        tiled_attention: on a CPU, whether attention over caches goes tile by tile (the runtime's flash attention).

    Raises:
        ServerStartError: the device is not there, or the installed ONNX Runtime cannot use it.
    """
    offered = ort.get_available_providers()
    if _PROVIDERS[device] not in offered:
        raise ServerStartError(
            f"device {device}: the installed ONNX Runtime offers {', '.join(offered)}; "
            "CUDA needs the extra `gpu` (instead of `cpu`) and an NVIDIA driver"
        )
    if device == "cuda":
        ort.preload_dlls()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Between two operators of a step a helping thread waits awake; between two steps, or with nothing to do, it sleeps.
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_US))
    options.log_severity_level = 3
    # On CPU the fused SkipLayerNormalization takes several times as long as Add and LayerNormalization; on CUDA it is right.
    disabled = ["SkipLayerNormFusion"] if device == "cpu" else []
    model = str(graph) if isinstance(graph, Path) else graph
    with _environment("ORT_GQA_DISABLE_FLASH_ATTENTION", "0" if tiled_attention else "1"):
        session = ort.InferenceSession(model, options, [_PROVIDERS[device]], disabled_optimizers=disabled)
    if _PROVIDERS[device] not in session.get_providers():
        raise ServerStartError(f"device {device}: ONNX Runtime could not use it and fell back to the CPU")
    return session


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """The runtime reads this one while it loads a graph, and has no option for it."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_graphs(bundle: Bundle, paths: tuple[Path, ...], *, device: str, threads: int) -> list[ort.InferenceSession]:
    """Graphs of a bundle; see ``load_graph``.

    Raises:
        ServerStartError: the device is not there, or the installed ONNX Runtime cannot use it.
        BundleError: a graph that cannot be loaded, or takes tensors from a file that the manifest does not list.
    """
    if faults := [fault for path in paths for fault in external_data_faults(path, bundle.manifest.files)]:
        raise BundleError(bundle.directory, faults)
    # Over bytes, tiles are slower.
    tiled = not bundle.manifest.has_int8_caches
    if tiled:
        # With more threads than heads they would share out the keys of a row, whose bits would then depend on the threads.
        threads = min(threads, bundle.manifest.architecture.num_heads)
    try:
        return [load_graph(path, device=device, threads=threads, tiled_attention=tiled) for path in paths]
    except ServerStartError:
        raise
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise BundleError(bundle.directory, [f"a graph cannot be loaded: {error}"]) from error


def run_graph(session: ort.InferenceSession, binding: ort.IOBinding) -> None:
    """Run a graph over what is bound.

    Raises:
        EngineError: the runtime failed.
    """
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise EngineError(f"a graph failed: {error}") from error
