"""``onnxlate export``: checkpoint -> module -> graphs -> certificate -> bundle, in that order and no other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from export import verify
from export.attention import HEAD_DIM_STEP
from export.cache_graphs import cache_rows_graph
from export.calibration import calibrated_graphs
from export.checkpoint import Checkpoint, build_model, read_checkpoint
from export.graphs import DecoderStepGraph, EncoderGraph, max_candidates
from export.model import Transformer
from export.onnx_export import MAX_BEAM_SIZE, OPSET, export_decoder, export_encoder
from export.writer import check_destination, write_bundle
from serving.bundle import (
    CACHE_ROWS_NAME,
    DECODER_NAME,
    ENCODER_NAME,
    FORMAT_REVISION,
    Architecture,
    Bundle,
    Certificate,
    Comparison,
    ManifestDraft,
    ModelLimits,
    Precision,
    Provenance,
    SpecialIds,
)
from serving.errors import ExportError, ServerStartError
from serving.tokenizer import open_tokenizer

# Sentences that the certificate is measured on.
_MAX_SENTENCES = 32


def export_bundle(
    checkpoint: Path, bundle: Path, *, precision: Precision = "fp32", overwrite: bool = False, show_progress: bool = True
) -> Bundle:
    """Export a checkpoint.

    Args:
        checkpoint: a directory that ``export.checkpoint`` can read.
        bundle: the directory to write; written whole, or not at all.
        precision: "fp32", "int8" (products and caches, scales measured on the sample sentences) or "fp16" (for CUDA).
        overwrite: replace a bundle that is there.
        show_progress: a bar on standard error.

    Raises:
        CheckpointError: the checkpoint cannot be used; lists every fault.
        ExportError: the destination is taken, the graphs are too far from the model, or the bundle could not be written.
    """
    check_destination(bundle, overwrite=overwrite)
    source = read_checkpoint(checkpoint)
    if source.config.head_dim % HEAD_DIM_STEP:
        raise ExportError(
            f"d_model / num_heads is {source.config.head_dim}: the runtime's attention needs a multiple of {HEAD_DIM_STEP}"
        )
    model = build_model(source)
    sources = sample_sources(source)
    # A phase each for the reference, a trace, its comparison and the writing; one pass over the sentences for each comparison.
    passes = 2 if precision == "fp32" else 3
    with tqdm(
        total=(3 if precision == "fp32" else 5) + passes * len(sources),
        desc="reference",
        disable=None if show_progress else True,
        leave=False,
    ) as bar:

        def phase(name: str) -> None:
            bar.set_description(name)
            bar.update()

        references = verify.make_references(model, sources)
        phase("trace fp32")
        graphs = _trace(model, EncoderGraph(model), DecoderStepGraph(model))
        files: dict[str, bytes | Path] = dict(source.tokenizer_files)
        phase("verify")
        comparisons = _compare_fp32(model, references, graphs, bar.update)
        verify.check(comparisons)
        if precision == "int8":
            phase("trace int8")
            graphs = _trace(model, *calibrated_graphs(model, references), torch.int8)
            phase("verify int8")
            comparisons["onnx_int8"] = _measure(references, verify.onnx_stepper(model.config, *graphs), model, bar.update)
        elif precision == "fp16":
            phase("trace fp16")
            model.half()
            graphs = _trace(model, EncoderGraph(model), DecoderStepGraph(model, ragged=False), torch.float16)
            files[CACHE_ROWS_NAME] = cache_rows_graph(2 * model.config.num_decoder_layers)
            phase("verify fp16")
            try:
                stepper = verify.onnx_stepper(model.config, *graphs, device="cuda")
            except ServerStartError as error:
                tqdm.write(f"fp16 was not verified here, so that the certificate says nothing of it: {error}", file=sys.stderr)
            else:
                comparisons["onnx_fp16"] = _measure(references, stepper, model, bar.update)
        phase("write")
        certificate = Certificate(
            sentences=len(references),
            decoded_tokens=sum(len(r.target_ids) for r in references),
            comparisons=comparisons,
        )
        files[ENCODER_NAME], files[DECODER_NAME] = graphs
        return write_bundle(bundle, files, _manifest(source, precision, certificate), overwrite=overwrite)


def sample_sources(checkpoint: Checkpoint) -> list[list[int]]:
    """Source ids for the certificate: the checkpoint's own sample sentences, or else ids drawn from its vocabulary."""
    config = checkpoint.config
    if checkpoint.sample_lines:
        tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
        lines = [line for line in checkpoint.sample_lines if line.strip()][:_MAX_SENTENCES]
        return [[*tokenizer.encode(line)[: config.max_positions - 1], config.eos_id] for line in lines]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, min(40, config.max_positions - 1), _MAX_SENTENCES)
    return [[*rng.integers(0, config.source_vocab_size, n).tolist(), config.eos_id] for n in lengths]


def _trace(
    model: Transformer, encoder: EncoderGraph, decoder: DecoderStepGraph, cache_dtype: torch.dtype = torch.float32
) -> tuple[bytes, bytes]:
    return export_encoder(encoder), export_decoder(decoder, model.config, cache_dtype)


def _compare_fp32(
    model: Transformer, references: list[verify.Reference], graphs: tuple[bytes, bytes], progress: Callable[[], object]
) -> dict[str, Comparison]:
    steppers = {
        "cached_pytorch": verify.pytorch_stepper(model),
        "onnx_fp32": verify.onnx_stepper(model.config, *graphs),
    }
    return {
        name: _measure(references, stepper, model, progress, tolerance=verify.FP32_LOGIT_TOLERANCE)
        for name, stepper in steppers.items()
    }


def _measure(
    references: list[verify.Reference],
    stepper: verify.Stepper,
    model: Transformer,
    progress: Callable[[], object],
    *,
    tolerance: float | None = None,
) -> Comparison:
    return verify.compare(
        references, stepper, model.config, reference_name="PyTorch, fp32, uncached", tolerance=tolerance, progress=progress
    )


def _manifest(checkpoint: Checkpoint, precision: Precision, certificate: Certificate) -> ManifestDraft:
    config = checkpoint.config
    return ManifestDraft(
        format_revision=FORMAT_REVISION,
        name=checkpoint.name,
        precision=precision,
        architecture=Architecture(
            d_model=config.d_model,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            source_vocab_size=config.source_vocab_size,
            target_vocab_size=config.target_vocab_size,
        ),
        ids=SpecialIds(pad=config.pad_id, eos=config.eos_id, decoder_start=config.decoder_start_id),
        limits=ModelLimits(
            max_source_tokens=config.max_positions,
            max_target_tokens=config.max_positions,
            max_candidates=max_candidates(config.target_vocab_size),
            max_beam_size=MAX_BEAM_SIZE,
        ),
        languages=checkpoint.languages,
        tokenizer=checkpoint.tokenizer,
        provenance=Provenance(
            checkpoint=checkpoint.name,
            weights_sha256=checkpoint.weights_sha256,
            onnxlate_version=metadata.version("onnxlate"),
            torch_version=torch.__version__,
            onnx_opset=OPSET,
        ),
        certificate=certificate,
    )
