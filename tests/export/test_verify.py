"""The certificate and its gate, and the export around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export import pipeline, verify
from export.calibration import calibrated_graphs
from export.graph_files import TracedGraph
from export.graphs import DecoderStepGraph, EncoderGraph
from export.model import Transformer
from export.onnx_export import TracedDecoder, export_decoder, export_encoder
from export.pipeline import export_bundle
from export.samples import Sample
from serving.bundle import Bundle
from serving.errors import BundleError, CheckpointError, ExportError
from serving.manifest import Comparison, Precision
from serving.runtime.host import HostModelSession
from tests.support import SAMPLE_LINES, TINY_VOCAB_SIZE, tiny_config, tiny_model, write_tiny_checkpoint
from tests.traces import serialized

SAMPLES = [Sample((5, 9, 11, 3)), Sample((20, 21, 22, 23, 24, 3)), Sample((7, 3))]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(tiny_config()).eval()


def comparison(difference: float = 0.0, agreement: float = 1.0, tolerance: float | None = 1e-3) -> Comparison:
    return Comparison(reference="r", max_abs_logit_difference=difference, token_agreement=agreement, tolerance=tolerance)


def test_references_are_the_models_own_greedy_translations(model: Transformer) -> None:
    for reference, sample in zip(verify.make_references(model, SAMPLES), SAMPLES, strict=True):
        assert reference.source_ids == sample.source_ids
        assert reference.target_ids[0] == model.config.decoder_start_id
        assert reference.logits.shape == (len(reference.target_ids), TINY_VOCAB_SIZE)
        decodable = reference.logits.copy()
        decodable[:, [model.config.pad_id, model.config.decoder_start_id]] = -np.inf
        assert tuple(decodable.argmax(axis=1)[:-1]) == reference.target_ids[1:]


def test_logits_are_kept_in_files_where_there_is_a_place_for_them(model: Transformer, tmp_path: Path) -> None:
    kept = verify.make_references(model, SAMPLES, logits_directory=tmp_path / "logits")
    assert [reference.stored_logits for reference in kept] == [tmp_path / "logits" / f"{i}.npy" for i in range(3)]
    for one, other in zip(kept, verify.make_references(model, SAMPLES), strict=True):
        assert (one.source_ids, one.target_ids) == (other.source_ids, other.target_ids)
        assert np.array_equal(one.logits, other.logits)


def test_logits_that_cannot_be_stored(model: Transformer, tmp_path: Path) -> None:
    (tmp_path / "logits").write_text("a file")
    with pytest.raises(ExportError, match="the model's logits could not be stored"):
        verify.make_references(model, SAMPLES, logits_directory=tmp_path / "logits")


def plain_references(model: Transformer, samples: list[Sample], longest: int) -> list[verify.Reference]:
    """Greedy translation written out: for each token an uncached pass over the whole prefix."""
    config, references = model.config, []
    for sample in samples:
        source, target, logits = sample.source_ids, [config.decoder_start_id, *sample.target_prefix], torch.empty(0)
        while True:
            with torch.no_grad():
                logits = model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([target]))[0]
            last = logits[-1].clone()
            last[[config.pad_id, config.decoder_start_id]] = -torch.inf
            best = int(last.argmax())
            if best == config.eos_id or len(target) == longest:
                break
            target.append(best)
        references.append(verify.Reference(source, tuple(target), logits.numpy()))
    return references


def assert_same(got: list[verify.Reference], expected: list[verify.Reference]) -> None:
    assert [(r.source_ids, r.target_ids) for r in got] == [(r.source_ids, r.target_ids) for r in expected]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)


# Added to the logit of the end of the sentence: random models of themselves never stop.
EAGER_TO_STOP = {"never": 0.0, "late": 1.5, "soon": 2.5}
FOUR_SAMPLES = [*SAMPLES, Sample((9, 9, 9, 9, 9, 9, 9, 3))]


def stopping_model(eagerness: str) -> Transformer:
    random = tiny_model(tiny_config(output_bias=True), seed=4)
    with torch.no_grad():
        assert random.output.bias is not None
        random.output.bias[random.config.eos_id] += EAGER_TO_STOP[eagerness]
    return random


@pytest.mark.parametrize("eagerness", EAGER_TO_STOP)
def test_references_equal_a_pass_for_every_token(eagerness: str) -> None:
    random = stopping_model(eagerness)
    references = verify.make_references(random, FOUR_SAMPLES)
    lengths = {len(reference.target_ids) for reference in references}
    assert lengths == {64} if eagerness == "never" else min(lengths) < max(lengths)
    assert_same(references, plain_references(random, FOUR_SAMPLES, 64))


@pytest.mark.parametrize("eagerness", EAGER_TO_STOP)
def test_references_start_with_what_a_target_is_made_to_start_with(eagerness: str) -> None:
    random = stopping_model(eagerness)
    samples = [Sample(sample.source_ids, (50 + i, 40)[: 1 + i % 2]) for i, sample in enumerate(FOUR_SAMPLES)]
    references = verify.make_references(random, samples)
    assert_same(references, plain_references(random, samples, 64))
    # It is nothing that the model would have said of itself.
    for reference, plain in zip(references, verify.make_references(random, FOUR_SAMPLES), strict=True):
        assert reference.target_ids[1:2] != plain.target_ids[1:2]


def test_a_model_of_few_positions_ends_there() -> None:
    random = tiny_model(tiny_config(max_positions=7), seed=1)
    references = verify.make_references(random, SAMPLES)
    assert max(len(reference.target_ids) for reference in references) == 7
    assert_same(references, plain_references(random, SAMPLES, 7))


# What is drafted after a prefix of so many tokens, from what would have been right.
WRONG_DRAFTS: dict[str, Callable[[list[int], int], list[int]]] = {
    "nothing": lambda right, prefix: right[:prefix],
    "too short": lambda right, prefix: right[: prefix + 2],
    "one token wrong": lambda right, prefix: [*right[: prefix + 1], *((token + 1) % 64 for token in right[prefix + 1 :])],
    "all tokens wrong": lambda right, prefix: [*right[:prefix], *((token + 7) % 64 for token in right[prefix:])],
    "beyond the end": lambda right, prefix: [*right, *[11] * (64 - len(right))],
}


@pytest.mark.parametrize("wrong", WRONG_DRAFTS.values(), ids=WRONG_DRAFTS.keys())
@pytest.mark.parametrize("eagerness", ["late", "soon"])
def test_wrong_drafts_change_nothing(
    wrong: Callable[[list[int], int], list[int]], eagerness: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = stopping_model(eagerness)
    expected = plain_references(random, FOUR_SAMPLES, 64)
    translations = {reference.source_ids: list(reference.target_ids) for reference in expected}
    drafts: list[list[int]] = []

    def draft(_e: object, _d: object, _c: object, source: tuple[int, ...], prefix: list[int], _longest: int) -> list[int]:
        right = translations[source]
        assert prefix == right[: len(prefix)], "a wrong token was kept"
        drafts.append(wrong(right, len(prefix)))
        return drafts[-1]

    monkeypatch.setattr(verify, "_drafted", draft)
    assert_same(verify.make_references(random, FOUR_SAMPLES), expected)
    assert any(tuple(d) not in {r.target_ids for r in expected} for d in drafts)


def test_cached_pytorch_is_the_uncached_pass(model: Transformer) -> None:
    references = verify.make_references(model, SAMPLES)
    measured = verify.compare(references, verify.pytorch_stepper(model), model.config, name="n", tolerance=1e-3)
    assert measured.reference == "PyTorch, fp32, uncached"
    assert measured.max_abs_logit_difference < 1e-4
    assert measured.token_agreement == 1


def test_a_difference_is_found_where_it_is(model: Transformer) -> None:
    references = verify.make_references(model, SAMPLES)
    exact = {reference.source_ids: reference.logits for reference in references}

    def off_at_one_place(reference: verify.Reference) -> NDArray[np.float32]:
        logits = exact[reference.source_ids].copy()
        if reference is references[1]:
            logits[0, 17] += 100.0
        return logits

    measured = verify.compare(references, off_at_one_place, model.config, name="n", tolerance=1e-3)
    positions = sum(len(reference.target_ids) for reference in references)
    assert measured.max_abs_logit_difference == pytest.approx(100.0, rel=1e-5)
    assert measured.token_agreement == pytest.approx((positions - 1) / positions)


def test_logits_that_are_no_numbers_are_refused(model: Transformer) -> None:
    references = verify.make_references(model, SAMPLES)

    def broken(reference: verify.Reference) -> NDArray[np.float32]:
        logits = reference.logits.copy()
        logits[-1, 20] = np.nan
        return logits

    with pytest.raises(ExportError, match=r"^onnx_int8: the graphs' logits are not finite; nothing was written$"):
        verify.compare(references, broken, model.config, name="onnx_int8", tolerance=None)


def test_a_candidate_that_is_not_the_best_of_its_own_logits_is_refused(model: Transformer) -> None:
    decoder = onnx.load_from_string(serialized(export_decoder(DecoderStepGraph(model).eval(), model.config).every_width))
    (maker,) = [node for node in decoder.graph.node if "candidate_ids" in node.output]
    maker.output[list(maker.output).index("candidate_ids")] = "right_ids"
    decoder.graph.initializer.append(numpy_helper.from_array(np.array(1), "one"))
    decoder.graph.node.append(helper.make_node("BitwiseXor", ["right_ids", "one"], ["candidate_ids"]))
    encoder = serialized(export_encoder(EncoderGraph(model).eval()))
    stepper = verify.onnx_stepper(model.config, encoder, decoder.SerializeToString(), name="onnx_fp16")
    with pytest.raises(ExportError, match=r"^onnx_fp16: the decoder's best candidate is not the best of its own logits; "):
        stepper(verify.make_references(model, SAMPLES)[0])


def test_a_model_whose_own_logits_are_no_numbers_is_refused() -> None:
    broken = Transformer(tiny_config()).eval()
    with torch.no_grad():
        broken.decoder.embedding.tokens.weight.fill_(3e38)
    with pytest.raises(ExportError, match="the model's own logits are not finite"):
        verify.make_references(broken, SAMPLES)


def test_heads_that_the_runtime_cannot_run_are_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", tiny_config(num_heads=4))
    with pytest.raises(ExportError, match=r"the width of a head is 4: .* multiple of 8"):
        export_bundle(checkpoint, tmp_path / "bundle", show_progress=False)


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (comparison(difference=2e-3), r"onnx_fp32: largest logit difference 2\.00e-03 \(tolerance 1e-03\)"),
        (comparison(agreement=0.999), r"agreement 99\.9000% \(100 % is needed\)"),
    ],
    ids=["logits", "tokens"],
)
def test_the_gate_closes(measured: Comparison, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        verify.check({"cached_pytorch": comparison(), "onnx_fp32": measured})


def test_the_gate_names_every_fault() -> None:
    with pytest.raises(ExportError, match=r"(?s)cached_pytorch: .*onnx_fp32: "):
        verify.check({"cached_pytorch": comparison(difference=1.0), "onnx_fp32": comparison(agreement=0.5)})


def test_the_gate_lets_pass_what_is_close_or_only_measured() -> None:
    verify.check({"onnx_fp32": comparison(difference=1e-3), "onnx_int8": comparison(0.3, 0.9, tolerance=None)})


def test_a_graph_that_is_not_the_model_is_not_exported(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder that is traced has other weights than the model: the real gate sees it, and nothing is written."""
    torch.manual_seed(1)
    other = Transformer(tiny_config()).eval()
    monkeypatch.setattr(pipeline, "export_encoder", lambda _: export_encoder(EncoderGraph(other)))
    with pytest.raises(ExportError, match=r"nothing was written:\n  onnx_fp32: largest logit difference"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_says_how_far_it_is_from_the_model(tiny_bundle: Bundle) -> None:
    certificate = tiny_bundle.manifest.certificate
    gated = {"cached_pytorch", "onnx_fp32"}
    assert set(certificate.comparisons) == gated | ({"onnx_int8"} if tiny_bundle.manifest.precision == "int8" else set())
    for name in gated:
        assert certificate.comparisons[name].tolerance == 1e-3
        assert certificate.comparisons[name].max_abs_logit_difference <= 1e-3
        assert certificate.comparisons[name].token_agreement == 1
    if "onnx_int8" in certificate.comparisons:
        int8 = certificate.comparisons["onnx_int8"]
        assert int8.tolerance is None
        assert int8.max_abs_logit_difference > certificate.comparisons["onnx_fp32"].max_abs_logit_difference
    assert certificate.decoded_tokens >= certificate.sentences > 0


def test_scales_of_int8_are_measured_on_other_sentences_than_the_certificate(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated: list[verify.Reference] = []
    certified: dict[str, list[verify.Reference]] = {}
    compare = verify.compare

    def watched_graphs(model: Transformer, references: Iterable[verify.Reference]) -> tuple[EncoderGraph, DecoderStepGraph]:
        calibrated.extend(references)
        return calibrated_graphs(model, calibrated)

    def watched_compare(references: list[verify.Reference], *args: Any, name: str, **options: Any) -> Comparison:
        certified[name] = references
        return compare(references, *args, name=name, **options)

    monkeypatch.setattr(pipeline, "calibrated_graphs", watched_graphs)
    monkeypatch.setattr(verify, "compare", watched_compare)
    bundle = export_bundle(tiny_checkpoint, tmp_path / "bundle", precision="int8", show_progress=False)
    assert certified.keys() == {"cached_pytorch", "onnx_fp32", "onnx_int8"}
    assert len(calibrated) == len(SAMPLE_LINES) // 2
    for references in certified.values():
        assert {r.source_ids for r in references}.isdisjoint({r.source_ids for r in calibrated})
        assert len(references) == bundle.manifest.certificate.sentences == len(SAMPLE_LINES) // 2
    assert bundle.manifest.certificate.sample_source == "sentences"
    assert capsys.readouterr().err == "", "sentences need no warning"


def test_one_sentence_is_not_enough_for_int8(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    (checkpoint / "samples.txt").write_text("a man runs\n")
    with pytest.raises(ExportError, match=r"^samples\.txt: int8 needs two different sentences or more"):
        export_bundle(checkpoint, tmp_path / "bundle", precision="int8", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


class NoTimeError(Exception):
    """Ends an export whose rest is of no interest."""


@pytest.mark.parametrize(
    ("precision", "measured"),
    [
        ("fp32", "the certificate is measured on"),
        ("int8", "the certificate is measured on"),
        ("fp16", "the certificate is measured on"),
    ],
    ids=["fp32", "int8", "fp16"],
)
def test_random_ids_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: Precision, measured: str
) -> None:
    def stop(_model: object, _sources: object, *, logits_directory: Path) -> list[verify.Reference]:
        raise NoTimeError

    monkeypatch.setattr(verify, "make_references", stop)
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    (checkpoint / "samples.txt").unlink()
    with pytest.raises(NoTimeError):
        export_bundle(checkpoint, tmp_path / "bundle", precision=precision, show_progress=False)
    assert capsys.readouterr().err == (
        f"{measured} random token ids, not on text: put some sentences of source text, one a line, in samples.txt "
        "beside the model\n"
    )


def test_a_certificate_states_its_random_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.samples._MAX_ALONE", 2)
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    (checkpoint / "samples.txt").unlink()
    certificate = export_bundle(checkpoint, tmp_path / "bundle", show_progress=False).manifest.certificate
    assert (certificate.sample_source, certificate.sentences) == ("random_ids", 2)


def test_a_taken_place_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(ExportError, match="bundle"):
        export_bundle(tmp_path / "no checkpoint is read", tmp_path / "bundle", show_progress=False)


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        export_bundle(tmp_path / "nothing", tmp_path / "bundle", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_the_runtime_cannot_load_is_a_fault_of_the_bundle(tiny_bundle: Bundle, tmp_path: Path) -> None:
    directory = tmp_path / "bundle"
    directory.mkdir()
    for path in tiny_bundle.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / "decoder.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="a graph cannot be loaded"):
        HostModelSession(Bundle(directory=directory, manifest=tiny_bundle.manifest))


def test_decoders_that_differ_are_no_bundle(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is of the one, and holds for the other because it is the same."""

    def spoiled(*arguments: Any) -> TracedDecoder:
        every_width, by_row = export_decoder(*arguments)
        assert by_row is not None
        weights = {name: 1.001 * weight if name == "output.weight" else weight for name, weight in by_row.weights.items()}
        assert "output.weight" in weights
        return TracedDecoder(every_width, TracedGraph(by_row.model, weights))

    monkeypatch.setattr(pipeline, "export_decoder", spoiled)
    with pytest.raises(ExportError, match="onnx_fp32: the decoder of lone workers has other logits than the decoder"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", show_progress=False)
    assert list(tmp_path.iterdir()) == []
