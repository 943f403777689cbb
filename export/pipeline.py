"""``onnxlate export``: checkpoint -> module -> graphs -> certificate -> bundle, in that order and no other."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch
from onnx import TensorProto
from tqdm import tqdm

from export import verify
from export.attention import HEAD_DIM_STEP
from export.cache_graphs import cache_rows_graph
from export.calibration import calibrated_graphs
from export.checkpoint import SAMPLES_NAME, Checkpoint, build_model, read_checkpoint, with_languages
from export.graph_files import TracedGraph, write_graphs
from export.graphs import DecoderStepGraph, Device, EncoderGraph, lay_out, max_candidates
from export.model import ModelConfig, Transformer
from export.onnx_export import MAX_BEAM_SIZE, OPSET, export_decoder, export_encoder
from export.row_scales import row_scaled_graphs
from export.samples import Samples, draw_samples
from export.writer import Owned, check_destination, working_directory, write_bundle
from serving.bundle import Bundle
from serving.errors import ExportError, ServerStartError
from serving.manifest import (
    CACHE_ROWS_NAME,
    DECODER_NAME,
    ENCODER_NAME,
    FORMAT_REVISION,
    LONE_DECODER_NAME,
    Architecture,
    Certificate,
    Comparison,
    Int8Scales,
    LanguagePair,
    ManifestDraft,
    ModelLimits,
    Precision,
    Provenance,
    SpecialIds,
)
from serving.tokenizers import open_tokenizer


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    *,
    precision: Precision = "fp32",
    int8_scales: Int8Scales | None = None,
    languages: Sequence[LanguagePair] = (),
    source_prefix: str = "",
    overwrite: bool = False,
    show_progress: bool = True,
) -> Bundle:
    """Export a checkpoint.

    The module and the runtime's sessions are never in memory together, and nobody holds the weights of a graph twice: an export
    of safetensors to fp32 or int8 takes less than twice the bytes of the parameters in float32, and a few hundred megabytes for
    the libraries; formats whose tensors are made anew may take more.

    Args:
        checkpoint: a directory that ``export.checkpoint`` can read.
        bundle: the directory to write; written whole, or not at all.
        precision: "fp32", "int8" or "fp16" (for CUDA).
        int8_scales: of activations, in int8: "constant" (caches are int8 too; half of the sample sentences are for the scales) or
            "row" (nothing is measured beforehand; caches are in float32). None is "constant" where the checkpoint has sample
            sentences, and "row" where it has none.
        languages: what it translates from and into, where the checkpoint does not say so, or too much.
        source_prefix: text that every source starts with, such as the task that a model of several tasks is told.
        overwrite: replace a bundle that is there.
        show_progress: a bar on standard error; what a user has to know is printed there with and without it.

    Raises:
        CheckpointError: the checkpoint cannot be used; lists every fault.
        ExportError: the destination is taken, ``int8_scales`` is given for another precision, ``source_prefix`` has no tokens of
            its own or no place, ``precision`` is not for this model, there is one sample sentence for two purposes, the graphs
            are too far from the model, the decoders differ, or the bundle could not be written.
    """
    check_destination(bundle, overwrite=overwrite)
    if int8_scales is not None and precision != "int8":
        raise ExportError(f"int8_scales: {int8_scales} is for int8, and the precision is {precision}")
    source = _with_prefix(read_checkpoint(checkpoint), source_prefix)
    if languages:
        source = with_languages(source, languages)
    config = source.config
    if config.head_dim % HEAD_DIM_STEP:
        raise ExportError(
            f"the width of a head is {config.head_dim}: the runtime's attention needs a multiple of {HEAD_DIM_STEP}"
        )
    if precision == "fp16" and config.positions == "relative":
        raise ExportError(
            "precision: fp16 is for CUDA, where the runtime's attention over in-place caches takes no relative positions, which "
            "this model has; int8 and fp32, for a CPU, are supported"
        )
    if precision == "int8" and int8_scales is None:
        # Constant ones are the faster, and no better than what they were measured on.
        int8_scales = "constant" if source.sample_lines else "row"
    model = build_model(source)
    samples = draw_samples(source, calibrate=int8_scales == "constant")
    for warning in _warnings(source, samples):
        tqdm.write(warning, file=sys.stderr)
    source = replace(source, tensors={})
    # A phase each for the reference, a trace, its comparison and the writing; one pass over the sentences for each comparison.
    passes = 2 if precision == "fp32" else 3
    total = (3 if precision == "fp32" else 5) + passes * len(samples.certify)
    with (
        working_directory(bundle) as work,
        tqdm(total=total, desc="reference", disable=None if show_progress else True, leave=False) as bar,
    ):
        references = verify.make_references(model, samples.certify, logits_directory=work / "references")
        certify = _Certifying(config, references, bar)
        certify.measure("cached_pytorch", verify.pytorch_stepper(model), verify.FP32_LOGIT_TOLERANCE)
        certify.phase("trace fp32")
        traced = _trace(config, lay_out(model))
        if precision != "fp32":
            # Not to be part of the bundle.
            del traced[LONE_DECODER_NAME]
        fp32_graphs = graphs = write_graphs(work / "fp32", traced)
        del traced
        gc.collect()  # what the tracer made refers in circles to the weights that it was given
        if precision != "fp32":
            certify.phase(f"trace {precision}")
            if precision == "fp16":
                traced = _trace_fp16(model)
            elif int8_scales == "row":
                traced = _trace(config, row_scaled_graphs(model))
            else:
                traced = _trace_constant_int8(model, samples, work)
            graphs = write_graphs(work / precision, traced)
            del traced
        # From here on the memory is the runtime's.
        del model
        gc.collect()
        certify.phase("verify")
        certify.measure_graphs("onnx_fp32", fp32_graphs, tolerance=verify.FP32_LOGIT_TOLERANCE)
        verify.check(certify.comparisons)
        if precision == "int8":
            certify.phase("verify int8")
            certify.measure_graphs("onnx_int8", graphs)
        elif precision == "fp16":
            certify.phase("verify fp16")
            try:
                certify.measure_graphs("onnx_fp16", graphs, device="cuda")
            except ServerStartError as error:
                tqdm.write(f"fp16 was not verified here, so that the certificate says nothing of it: {error}", file=sys.stderr)
        certify.phase("write")
        files: dict[str, bytes | Path | Owned] = {name: Owned(path) for name, path in graphs.items()}
        files |= source.tokenizer_files
        if precision == "fp16":
            files[CACHE_ROWS_NAME] = cache_rows_graph(2 * config.num_decoder_layers, TensorProto.FLOAT16)
        certificate = Certificate(
            sample_source=samples.source,
            sentences=len(references),
            decoded_tokens=sum(len(r.target_ids) for r in references),
            comparisons=certify.comparisons,
        )
        return write_bundle(bundle, files, _manifest(source, precision, int8_scales, certificate), overwrite=overwrite)


def _with_prefix(checkpoint: Checkpoint, text: str) -> Checkpoint:
    """The checkpoint, each of whose sources starts with the tokens of a text."""
    if not text:
        return checkpoint
    told = checkpoint.language_tokens
    if told is not None and told.before_source is not None:
        raise ExportError("source_prefix: sources of this model start with a language's token, and no text comes before it")
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    ids, probe = tokenizer.encode(text), "a"
    if not ids or tokenizer.encode(f"{text.rstrip()} {probe}") != [*ids, *tokenizer.encode(probe)]:
        raise ExportError(f"source_prefix: {text!r} has no tokens of its own; the tokenizer joins them with those of a text")
    return replace(checkpoint, source_prefix=(*checkpoint.source_prefix, *ids))


class _Certifying:
    """Comparisons with the references, as they are made, and how far the export is."""

    def __init__(self, config: ModelConfig, references: list[verify.Reference], bar: tqdm[NoReturn]) -> None:
        self.comparisons: dict[str, Comparison] = {}
        self._config = config
        self._references = references
        self._bar = bar

    def phase(self, name: str) -> None:
        """The phase before is over."""
        self._bar.set_description(name)
        self._bar.update()

    def measure(self, name: str, stepper: verify.Stepper, tolerance: float | None = None) -> None:
        """Compare a stepper with the references."""
        self.comparisons[name] = verify.compare(
            self._references, stepper, self._config, name=name, tolerance=tolerance, progress=self._bar.update
        )

    def measure_graphs(
        self, name: str, graphs: Mapping[str, Path], *, tolerance: float | None = None, device: Device = "cpu"
    ) -> None:
        """Compare graphs with the references; raises ServerStartError where the device is not there."""
        stepper = verify.onnx_stepper(self._config, graphs[ENCODER_NAME], graphs[DECODER_NAME], name=name, device=device)
        self.measure(name, stepper, tolerance)
        if LONE_DECODER_NAME in graphs:
            logits = stepper(self._references[0])
            del stepper  # before the next one is in memory
            lone = verify.onnx_stepper(self._config, graphs[ENCODER_NAME], graphs[LONE_DECODER_NAME], name=name, device=device)
            verify.check_same_bits(name, logits, lone(self._references[0]))


def _warnings(checkpoint: Checkpoint, samples: Samples) -> list[str]:
    """What its user has to know of an export that succeeds, one line each, and what can be done about it."""
    warnings = list(checkpoint.warnings)
    if samples.source == "random_ids":
        measured = "the certificate and the constant scales of int8 are" if samples.calibrate else "the certificate is"
        warnings.append(
            f"{measured} measured on random token ids, not on text: put some sentences of source text, one a line, "
            f"in {SAMPLES_NAME} beside the model"
        )
    return warnings


def _trace_constant_int8(model: Transformer, samples: Samples, work: Path) -> dict[str, TracedGraph]:
    references = verify.make_references(model, samples.calibrate, logits_directory=work / "calibration")
    return _trace(model.config, calibrated_graphs(model, references), torch.int8)


def _trace_fp16(model: Transformer) -> dict[str, TracedGraph]:
    return _trace(model.config, lay_out(model.half(), device="cuda"), torch.float16)


def _trace(
    config: ModelConfig, graphs: tuple[EncoderGraph, DecoderStepGraph], cache_dtype: torch.dtype = torch.float32
) -> dict[str, TracedGraph]:
    encoder, decoder = graphs
    traced = {ENCODER_NAME: export_encoder(encoder)}
    traced[DECODER_NAME], by_row = export_decoder(decoder, config, cache_dtype)
    return traced if by_row is None else {**traced, LONE_DECODER_NAME: by_row}


def _manifest(
    checkpoint: Checkpoint, precision: Precision, int8_scales: Int8Scales | None, certificate: Certificate
) -> ManifestDraft:
    config = checkpoint.config
    return ManifestDraft(
        format_revision=FORMAT_REVISION,
        name=checkpoint.name,
        precision=precision,
        int8_scales=int8_scales,
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
