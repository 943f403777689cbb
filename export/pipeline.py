"""``onnxlate export``: checkpoint -> module -> graphs -> certificate -> bundle, in that order and no other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from onnx import TensorProto
from tqdm import tqdm

from export import verify
from export.attention import HEAD_DIM_STEP
from export.cache_graphs import cache_rows_graph
from export.calibration import calibrated_graphs
from export.checkpoint import SAMPLES_NAME, Checkpoint, build_model, read_checkpoint, with_languages
from export.graphs import DecoderStepGraph, EncoderGraph, max_candidates
from export.model import Transformer
from export.onnx_export import MAX_BEAM_SIZE, OPSET, export_decoder, export_encoder
from export.samples import Samples, draw_samples
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
    LanguagePair,
    ManifestDraft,
    ModelLimits,
    Precision,
    Provenance,
    SpecialIds,
)
from serving.errors import ExportError, ServerStartError


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    *,
    precision: Precision = "fp32",
    languages: Sequence[LanguagePair] = (),
    overwrite: bool = False,
    show_progress: bool = True,
) -> Bundle:
    """Export a checkpoint.

    Args:
        checkpoint: a directory that ``export.checkpoint`` can read.
        bundle: the directory to write; written whole, or not at all.
        precision: "fp32", "int8" (products and caches; half of the sample sentences are for its scales) or "fp16" (for CUDA).
        languages: what it translates from and into, where the checkpoint does not say so, or too much.
        overwrite: replace a bundle that is there.
        show_progress: a bar on standard error; what a user has to know is printed there with and without it.

    Raises:
        CheckpointError: the checkpoint cannot be used; lists every fault.
        ExportError: the destination is taken, there is one sample sentence for two purposes, the graphs are too far from the
            model, or the bundle could not be written.
    """
    check_destination(bundle, overwrite=overwrite)
    source = read_checkpoint(checkpoint)
    if languages:
        source = with_languages(source, languages)
    if source.config.head_dim % HEAD_DIM_STEP:
        raise ExportError(
            f"d_model / num_heads is {source.config.head_dim}: the runtime's attention needs a multiple of {HEAD_DIM_STEP}"
        )
    model = build_model(source)
    samples = draw_samples(source, calibrate=precision == "int8")
    for warning in _warnings(source, samples):
        tqdm.write(warning, file=sys.stderr)
    # A phase each for the reference, a trace, its comparison and the writing; one pass over the sentences for each comparison.
    passes = 2 if precision == "fp32" else 3
    with tqdm(
        total=(3 if precision == "fp32" else 5) + passes * len(samples.certify),
        desc="reference",
        disable=None if show_progress else True,
        leave=False,
    ) as bar:

        def phase(name: str) -> None:
            bar.set_description(name)
            bar.update()

        references = verify.make_references(model, samples.certify)
        phase("trace fp32")
        graphs = _trace(model, EncoderGraph(model), DecoderStepGraph(model))
        files: dict[str, bytes | Path] = dict(source.tokenizer_files)
        phase("verify")

        def measure(name: str, stepper: verify.Stepper, tolerance: float | None = None) -> None:
            comparisons[name] = verify.compare(
                references, stepper, model.config, name=name, tolerance=tolerance, progress=bar.update
            )

        comparisons: dict[str, Comparison] = {}
        measure("cached_pytorch", verify.pytorch_stepper(model), verify.FP32_LOGIT_TOLERANCE)
        measure("onnx_fp32", verify.onnx_stepper(model.config, *graphs, name="onnx_fp32"), verify.FP32_LOGIT_TOLERANCE)
        verify.check(comparisons)
        if precision == "int8":
            phase("trace int8")
            calibrated = calibrated_graphs(model, verify.make_references(model, samples.calibrate))
            graphs = _trace(model, *calibrated, torch.int8)
            phase("verify int8")
            measure("onnx_int8", verify.onnx_stepper(model.config, *graphs, name="onnx_int8"))
        elif precision == "fp16":
            phase("trace fp16")
            model.half()
            graphs = _trace(model, EncoderGraph(model), DecoderStepGraph(model, device="cuda"), torch.float16)
            files[CACHE_ROWS_NAME] = cache_rows_graph(2 * model.config.num_decoder_layers, TensorProto.FLOAT16)
            phase("verify fp16")
            try:
                stepper = verify.onnx_stepper(model.config, *graphs, name="onnx_fp16", device="cuda")
            except ServerStartError as error:
                tqdm.write(f"fp16 was not verified here, so that the certificate says nothing of it: {error}", file=sys.stderr)
            else:
                measure("onnx_fp16", stepper)
        phase("write")
        certificate = Certificate(
            sample_source=samples.source,
            sentences=len(references),
            decoded_tokens=sum(len(r.target_ids) for r in references),
            comparisons=comparisons,
        )
        files[ENCODER_NAME], files[DECODER_NAME] = graphs
        return write_bundle(bundle, files, _manifest(source, precision, certificate), overwrite=overwrite)


def _warnings(checkpoint: Checkpoint, samples: Samples) -> list[str]:
    """What its user has to know of an export that succeeds, one line each, and what can be done about it."""
    warnings = list(checkpoint.warnings)
    if samples.source == "random_ids":
        measured = "the certificate and the scales of int8 are" if samples.calibrate else "the certificate is"
        warnings.append(
            f"{measured} measured on random token ids, not on text: put some sentences of source text, one a line, "
            f"in {SAMPLES_NAME} beside the model"
        )
    return warnings


def _trace(
    model: Transformer, encoder: EncoderGraph, decoder: DecoderStepGraph, cache_dtype: torch.dtype = torch.float32
) -> tuple[bytes, bytes]:
    return export_encoder(encoder), export_decoder(decoder, model.config, cache_dtype)


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
        language_tokens=checkpoint.language_tokens,
        source_prefix=list(checkpoint.source_prefix),
        source_ends_with_eos=checkpoint.source_ends_with_eos,
        target_prefix=list(checkpoint.target_prefix),
        defaults=checkpoint.defaults,
        tokenizer=checkpoint.tokenizer,
        provenance=Provenance(
            checkpoint=checkpoint.name,
            weights_sha256=checkpoint.weights_sha256,
            onnxlate_version=metadata.version("onnxlate"),
            torch_version=torch.__version__,
            onnx_opset=OPSET,
            num_beams=checkpoint.num_beams,
        ),
        certificate=certificate,
    )
