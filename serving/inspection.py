"""A manifest as a person reads it, for ``onnxlate inspect``.

Knows the manifest's fields; does not know files, or how a bundle is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.manifest import Certificate, DefaultOptions, Int8Scales, Manifest

_INT8_SCALES: dict[Int8Scales, str] = {"constant": "constant scales", "row": "a scale for each row, found at run time"}


def describe(manifest: Manifest) -> str:
    """The manifest for a person."""
    sizes, limits, origin, certificate = manifest.architecture, manifest.limits, manifest.provenance, manifest.certificate
    layers = f"{sizes.num_encoder_layers} encoder and {sizes.num_decoder_layers} decoder layers"
    beams = "" if origin.num_beams is None else f", made for {origin.num_beams} beams"
    facts = {
        "name": manifest.name,
        "version": manifest.version(),
        "precision": manifest.precision + ("" if manifest.int8_scales is None else f", {_INT8_SCALES[manifest.int8_scales]}"),
        "languages": ", ".join(f"{pair.source} -> {pair.target}" for pair in manifest.languages) or "not stated",
        "model": f"{layers}, d_model {sizes.d_model}, {sizes.num_heads} heads of {sizes.head_dim}",
        "vocabulary": f"{sizes.source_vocab_size} source, {sizes.target_vocab_size} target",
        "limits": f"{limits.max_source_tokens} source tokens, {limits.max_target_tokens} target tokens, "
        f"beams of {limits.max_beam_size}, {limits.max_candidates} candidates a step",
        "defaults": _chosen(manifest.defaults),
        "tokenizer": f"{manifest.tokenizer.kind} ({', '.join(manifest.tokenizer.file_names)})",
        "checkpoint": f"{origin.checkpoint} (weights {origin.weights_sha256[:12]}){beams}",
        "made by": f"onnxlate {origin.onnxlate_version}, torch {origin.torch_version}, ONNX opset {origin.onnx_opset}",
        "format": f"revision {manifest.format_revision}",
    }
    files = [("", "MB", "sha256")]
    files += [(name, f"{entry.bytes / 1e6:.2f}", entry.sha256[:12]) for name, entry in sorted(manifest.files.items())]
    comparisons = [("", "against", "largest logit difference", "tolerance", "same tokens")]
    comparisons += [
        (
            name,
            comparison.reference,
            f"{comparison.max_abs_logit_difference:.2e}",
            "none" if comparison.tolerance is None else f"{comparison.tolerance:.0e}",
            f"{comparison.token_agreement:.2%}",
        )
        for name, comparison in certificate.comparisons.items()
    ]
    return "\n".join(
        [
            *_aligned(tuple(facts.items())),
            "",
            "files",
            *_aligned(files),
            "",
            f"certificate, measured on {_samples(certificate)}, {certificate.decoded_tokens} decoded tokens",
            *_aligned(comparisons),
        ]
    )


def _chosen(defaults: DefaultOptions) -> str:
    """The default options that are not as in any other bundle."""
    usual = DefaultOptions()
    chosen = {name: value for name, value in defaults if value != getattr(usual, name)}
    return ", ".join(f"{name} {value}" for name, value in chosen.items()) or "the usual"


def _samples(certificate: Certificate) -> str:
    match certificate.sample_source:
        case "sentences":
            return f"{certificate.sentences} sentences"
        case "random_ids":
            return f"{certificate.sentences} sources of random token ids, not text"
        case None:
            return f"{certificate.sentences} sources (whether sentences or random token ids is not stated)"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
