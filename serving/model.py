"""A bundle, loaded and ready to translate: engine, tokenizer and rules put together.

The server and the offline command load through here, so that both answer alike. Does not know gRPC or the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.bundle import read_bundle
from serving.config import EngineConfig, RequestLimits
from serving.errors import ServerStartError
from serving.manifest import Manifest
from serving.observer import EngineObserver
from serving.preparation import ModelDescription, TextPreparer
from serving.request_options import TranslationLimits
from serving.tokenizers import load_tokenizer
from serving.translator import DecodingEngine
from serving.version import package_version


class ManagedEngine(DecodingEngine, Protocol):
    """An engine as its owner sees it."""

    def start(self) -> None:
        """Start the workers."""

    def drain(self) -> None:
        """Admit no more; what was admitted finishes."""

    def close(self) -> None:
        """Stop the workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that answers; whoever loaded it closes ``engine``."""

    engine: ManagedEngine
    preparer: TextPreparer
    description: ModelDescription
    # Cache rows of each worker.
    worker_rows: tuple[int, ...] = ()


def load_model(directory: Path, config: EngineConfig, limits: RequestLimits, observer: EngineObserver) -> ServedModel:
    """Read, check and load a bundle, and start its engine.

    Raises:
        BundleError: the bundle cannot be served; every fault is listed.
        ServerStartError: ONNX Runtime is not installed, or lacks the device.
    """
    bundle = read_bundle(directory)
    tokenizer = load_tokenizer(bundle)
    # Here, because a client's install and `onnxlate inspect` do without ONNX Runtime.
    try:
        from serving.engine import Engine
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise ServerStartError(
            "ONNX Runtime is not installed: install onnxlate[cpu], or onnxlate[gpu] where there is an NVIDIA GPU"
        ) from error
    engine = Engine(bundle, config, observer)
    engine.start()
    manifest = bundle.manifest
    return ServedModel(
        engine=engine,
        preparer=TextPreparer(
            tokenizer=tokenizer,
            eos_id=manifest.ids.eos,
            languages=tuple((pair.source, pair.target) for pair in manifest.languages),
            language_tokens=manifest.language_tokens,
            source_prefix=tuple(manifest.source_prefix),
            source_ends_with_eos=manifest.source_ends_with_eos,
            target_prefix=tuple(manifest.target_prefix),
            defaults=manifest.defaults,
            limits=limits_of(manifest, config, limits),
        ),
        description=ModelDescription(
            name=manifest.name,
            version=manifest.version(),
            server_version=package_version(),
            precision=manifest.precision,
            device=config.device,
        ),
        worker_rows=(config.max_rows_per_worker,) * config.num_workers,
    )


def limits_of(manifest: Manifest, config: EngineConfig, limits: RequestLimits) -> TranslationLimits:
    """The lower of what the server and the model allow.

    A beam of W looks at the 2 * W best candidates of a step, and at one more because the end of the sentence may be forbidden;
    the decoder graph returns at most ``max_candidates``. A beam's rows all belong to one worker.
    """
    widest = max(1, (manifest.limits.max_candidates - 1) // 2)
    told = manifest.language_tokens
    hidden = len(manifest.target_prefix) + (told is not None and told.before_target)
    return TranslationLimits(
        # More would never fit into the queue.
        max_texts_per_request=min(limits.max_texts_per_request, config.max_waiting_sequences),
        max_source_tokens=min(limits.max_source_tokens, manifest.limits.max_source_tokens),
        max_target_tokens=min(limits.max_target_tokens, manifest.limits.max_target_tokens - hidden),
        max_beam_size=min(limits.max_beam_size, manifest.limits.max_beam_size, widest, config.max_rows_per_worker),
        max_request_s=limits.max_request_s,
    )
