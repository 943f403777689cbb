"""A bundle's graphs on ONNX Runtime: ``encode`` and ``step``. The only package that imports onnxruntime.

Knows graph inputs and outputs by name, devices, threads and binding; does not know sequences, scheduling, search or text.

On the CPU (`host.py`) the graphs read and write the lane's arrays where they are. On a device (`device.py`) the caches and what
the encoder makes stay in the device's memory; only tokens and positions go there, and candidates come back.
"""

from __future__ import annotations

from serving.bundle import Bundle
from serving.errors import ServerStartError
from serving.runtime.base import LaneDecoder, ModelSession, pad_sources
from serving.runtime.device import DeviceModelSession
from serving.runtime.graphs import load_graph
from serving.runtime.host import HostModelSession

__all__ = ["LaneDecoder", "ModelSession", "load_graph", "open_session", "pad_sources"]

# Precisions that a device has kernels for, and why it is no others.
_PRECISIONS = {
    "cpu": (("int8", "fp32"), "fp16 is for CUDA: a CPU lacks kernels for its attention"),
    "cuda": (
        ("fp16",),
        "CUDA has kernels for attention over in-place caches in fp16 only, and none for these int8 products",
    ),
}


def open_session(bundle: Bundle, *, device: str = "cpu", threads: int = 1, lone_threads: int = 1) -> ModelSession:
    """Load a bundle's graphs onto a device.

    Args:
        bundle: a bundle that was read, and so checked.
        device: "cpu" or "cuda".
        threads: CPU threads of one call; 1 runs it on the caller's.
        lone_threads: CPU threads of a call that is made alone; more than ``threads`` loads the encoder a second time, and the
            decoder of lone workers where the bundle has it.

    Raises:
        ServerStartError: the device is not there, or has no kernels for the bundle's precision.
        BundleError: a graph that cannot be loaded, or is not of this format.
    """
    precisions, why = _PRECISIONS[device]
    precision = bundle.manifest.precision
    if precision not in precisions:
        remedy = " or ".join(f"--precision {name}" for name in precisions)
        raise ServerStartError(f"device {device} cannot run a bundle of {precision}; export the checkpoint with {remedy} ({why})")
    if device == "cpu":
        return HostModelSession(bundle, threads=threads, lone_threads=lone_threads)
    return DeviceModelSession(bundle, device=device, threads=threads)
