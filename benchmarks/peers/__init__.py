"""The libraries that are compared, each behind one protocol; imported when its peer is opened, in a process of its own."""

from __future__ import annotations

import importlib

from benchmarks.peers.base import Peer, PeerSpec, Split

ONNXLATE, CTRANSLATE2, HUGGING_FACE = "onnxlate", "ctranslate2", "hugging_face"
# Peer -> its name in a report.
PEERS = {ONNXLATE: "onnxlate", CTRANSLATE2: "CTranslate2", HUGGING_FACE: "Hugging Face"}


def open_peer(spec: PeerSpec) -> Peer:
    """Load a peer's library and its model.

    Raises:
        ImportError: the library is not installed.
        Exception: whatever the library raises.
    """
    module = importlib.import_module(f"benchmarks.peers.{spec.peer}")
    opened: Peer = module.open_model(spec)
    return opened


def splits_of(peer: str, cores: int, device: str = "cpu") -> tuple[Split, ...]:
    """The splits worth trying on so many CPUs: several batches at once, all threads on one, and what onnxlate does by default."""
    if device != "cpu":
        return (Split(1, 1),)
    tried = {
        ONNXLATE: (Split(cores, 1), Split(1, cores), default_split(cores)),
        CTRANSLATE2: (Split(cores, 1), Split(1, cores), *((Split(cores // 2, 2),) if cores >= 4 else ())),
        HUGGING_FACE: (Split(1, cores),),
    }
    return tuple(dict.fromkeys(tried[peer]))


def default_split(cores: int) -> Split:
    """What ``EngineConfig`` has onnxlate do with so many CPUs where nobody says otherwise."""
    return Split(cores, 1, threads_when_alone=cores) if cores > 1 else Split(1, 1)
