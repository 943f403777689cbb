from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serving.bundle import read_bundle
from serving.errors import BundleError
from serving.inspection import describe
from serving.manifest import Comparison, Manifest

FILES = {"encoder.onnx": b"the encoder", "decoder.onnx": b"the decoder step", "sentencepiece.model": b"pieces"}


def manifest_fields() -> dict[str, Any]:
    return {
        "format_revision": 4,
        "name": "tiny",
        "precision": "int8",
        "architecture": {
            "d_model": 16,
            "num_heads": 2,
            "head_dim": 8,
            "num_encoder_layers": 2,
            "num_decoder_layers": 1,
            "source_vocab_size": 64,
            "target_vocab_size": 64,
        },
        "ids": {"pad": 0, "eos": 3, "decoder_start": 2},
        "limits": {"max_source_tokens": 128, "max_target_tokens": 127, "max_candidates": 33, "max_beam_size": 16},
        "languages": [{"source": "en", "target": "de"}],
        "tokenizer": {
            "kind": "sentencepiece",
            "source_model": "sentencepiece.model",
            "target_model": "sentencepiece.model",
        },
        "provenance": {
            "checkpoint": "tiny-checkpoint",
            "weights_sha256": "ab" * 32,
            "onnxlate_version": "0.1.0",
            "torch_version": "2.13.0",
            "onnx_opset": 20,
        },
        "certificate": {
            "sample_source": "sentences",
            "sentences": 100,
            "decoded_tokens": 1234,
            "comparisons": {
                "cached_pytorch": {
                    "reference": "full pass",
                    "max_abs_logit_difference": 1e-6,
                    "token_agreement": 1.0,
                    "tolerance": 1e-3,
                },
                "onnx_int8": {
                    "reference": "PyTorch fp32",
                    "max_abs_logit_difference": 0.25,
                    "token_agreement": 0.9876,
                    "tolerance": None,
                },
            },
        },
        "files": {
            name: {"sha256": hashlib.sha256(contents).hexdigest(), "bytes": len(contents)} for name, contents in FILES.items()
        },
    }


def write_manifest(directory: Path, fields: dict[str, Any]) -> None:
    (directory / "manifest.json").write_text(json.dumps(fields), encoding="utf-8")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "bundle"
    place.mkdir()
    for name, contents in FILES.items():
        (place / name).write_bytes(contents)
    write_manifest(place, manifest_fields())
    return place


def faults_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(BundleError, match=r"bundle .* cannot be used") as caught:
        read_bundle(directory)
    return caught.value.faults


def test_reads_a_whole_bundle(directory: Path) -> None:
    bundle = read_bundle(directory)
    assert bundle.manifest.model_dump(mode="json", exclude_unset=True) == manifest_fields()
    assert bundle.encoder_path.read_bytes() == b"the encoder"
    assert bundle.decoder_path.read_bytes() == b"the decoder step"
    assert bundle.path("sentencepiece.model") == directory / "sentencepiece.model"


def test_a_link_to_the_directory_is_followed(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(directory)
    assert read_bundle(tmp_path / "current").manifest.name == "tiny"


def test_files_that_are_not_listed_are_ignored(directory: Path) -> None:
    (directory / "README.md").write_text("notes")
    (directory / "link").symlink_to("/etc/hostname")
    assert read_bundle(directory).manifest.name == "tiny"


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    assert faults_of(tmp_path / "none") == ("there is no such directory",)


def test_a_manifest_that_is_missing(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    assert faults_of(directory) == ("manifest.json: is missing",)


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"name": "ti', id="cut"),
        pytest.param(b'{"name": "\xff"}', id="not UTF-8"),
        pytest.param(b"[" * 100_000, id="nested without end"),
    ],
)
def test_a_manifest_that_is_not_json(directory: Path, contents: bytes) -> None:
    (directory / "manifest.json").write_bytes(contents)
    (fault,) = faults_of(directory)
    assert fault.startswith("manifest.json: is not JSON: ")


@pytest.mark.parametrize("revision", [3, 5], ids=["older", "newer"])
def test_another_revision_is_named_before_its_unknown_fields(directory: Path, revision: int) -> None:
    write_manifest(directory, {**manifest_fields(), "format_revision": revision, "novelty": True})
    assert faults_of(directory) == (
        f"manifest.json: format_revision: {revision} is not supported (supported: 4); "
        "export the checkpoint again with this version of onnxlate",
    )


def test_a_bundle_of_the_first_revision_is_told_what_to_do_and_not_which_field_it_lacks(directory: Path) -> None:
    fields = {**manifest_fields(), "format_revision": 1}
    del fields["limits"]["max_beam_size"]
    write_manifest(directory, fields)
    with pytest.raises(BundleError, match="export the checkpoint again with this version of onnxlate") as caught:
        read_bundle(directory)
    assert "max_beam_size" not in str(caught.value)


def test_the_widest_beam_must_be_stated(directory: Path) -> None:
    fields = manifest_fields()
    del fields["limits"]["max_beam_size"]
    write_manifest(directory, fields)
    (fault,) = faults_of(directory)
    assert fault.startswith("manifest.json: limits.max_beam_size: ")


def test_every_field_that_is_wrong_is_named_by_its_path(directory: Path) -> None:
    fields = manifest_fields()
    fields["novelty"] = True
    fields["precision"] = "int4"
    del fields["name"]
    fields["architecture"]["d_model"] = "16"
    fields["limits"]["max_candidates"] = 0
    fields["languages"][0]["dialect"] = "at"
    fields["tokenizer"]["kind"] = "words"
    fields["certificate"]["comparisons"]["onnx_int8"]["token_agreement"] = 1.5
    fields["files"]["encoder.onnx"]["sha256"] = "AB"
    write_manifest(directory, fields)
    assert sorted(fault.removeprefix("manifest.json: ").partition(": ")[0] for fault in faults_of(directory)) == [
        "architecture.d_model",
        "certificate.comparisons.onnx_int8.token_agreement",
        "files.encoder.onnx.sha256",
        "languages.0.dialect",
        "limits.max_candidates",
        "name",
        "novelty",
        "precision",
        "tokenizer.kind",
    ]


@pytest.mark.parametrize("document", [[], "text", None, {}, {"format_revision": True}, {"format_revision": "1"}], ids=repr)
def test_json_that_is_no_manifest(directory: Path, document: Any) -> None:
    (directory / "manifest.json").write_text(json.dumps(document))
    assert all(fault.startswith("manifest.json: ") for fault in faults_of(directory))


@pytest.mark.parametrize(
    ("stated", "in_bytes"), [({}, True), ({"int8_scales": "constant"}, True), ({"int8_scales": "row"}, False)], ids=str
)
def test_caches_follow_from_the_scales(stated: dict[str, str], in_bytes: bool) -> None:
    assert Manifest.model_validate(manifest_fields() | stated).has_int8_caches is in_bytes
    assert not Manifest.model_validate(manifest_fields() | {"precision": "fp32"}).has_int8_caches


def test_scales_are_of_int8_and_of_a_known_kind(directory: Path) -> None:
    write_manifest(directory, manifest_fields() | {"precision": "fp32", "int8_scales": "row"})
    assert faults_of(directory) == ("manifest.json: int8_scales: row in a bundle of fp32",)
    write_manifest(directory, manifest_fields() | {"int8_scales": "column"})
    (fault,) = faults_of(directory)
    assert fault.startswith("manifest.json: int8_scales: ")


def test_every_fault_of_the_files_is_told_at_once(directory: Path) -> None:
    fields = manifest_fields()
    fields["tokenizer"]["target_model"] = "target.model"
    fields["ids"]["eos"] = 64
    fields["files"]["extra.bin"] = {"sha256": "00" * 32, "bytes": 1}
    fields["files"]["../outside"] = {"sha256": "00" * 32, "bytes": 1}
    write_manifest(directory, fields)
    (directory / "encoder.onnx").write_bytes(b"the Encoder")
    (directory / "decoder.onnx").write_bytes(b"the decoder")
    (directory / "sentencepiece.model").unlink()
    (directory / "sentencepiece.model").symlink_to(directory / "README.md")
    assert faults_of(directory) == (
        "'../outside': is not a plain file name; nothing outside the directory is read",
        "target.model: needed, and not among the bundle's files",
        "manifest.json: ids.eos: 64 is outside a vocabulary of 64",
        "encoder.onnx: its contents have changed (SHA-256 differs)",
        "decoder.onnx: has 11 bytes instead of 16",
        "sentencepiece.model: is a symbolic link; none is followed",
        "extra.bin: is missing",
    )


@pytest.mark.parametrize("name", ["/etc/hostname", "../bundle/encoder.onnx", "sub/file", "..", ".", "", "a\\b", "a\0b"])
def test_a_name_that_is_not_plain_is_refused(directory: Path, name: str) -> None:
    fields = manifest_fields()
    fields["files"][name] = fields["files"]["encoder.onnx"]
    write_manifest(directory, fields)
    assert faults_of(directory) == (f"{name!r}: is not a plain file name; nothing outside the directory is read",)


def test_a_tokenizer_file_outside_the_directory_is_refused(directory: Path) -> None:
    fields = manifest_fields()
    fields["tokenizer"]["source_model"] = "../bundle/sentencepiece.model"
    write_manifest(directory, fields)
    assert faults_of(directory) == ("../bundle/sentencepiece.model: needed, and not among the bundle's files",)


@pytest.mark.parametrize("name", ["encoder.onnx", "decoder.onnx", "sentencepiece.model"])
def test_a_needed_file_that_is_not_listed(directory: Path, name: str) -> None:
    fields = manifest_fields()
    del fields["files"][name]
    write_manifest(directory, fields)
    assert faults_of(directory) == (f"{name}: needed, and not among the bundle's files",)


def test_a_manifest_that_lists_itself(directory: Path) -> None:
    fields = manifest_fields()
    fields["files"]["manifest.json"] = {"sha256": "00" * 32, "bytes": 1}
    write_manifest(directory, fields)
    assert "manifest.json: cannot list itself" in faults_of(directory)


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        (
            {"source_prefix": [64], "target_prefix": [7, 64]},
            ("source_prefix: 64 is outside a vocabulary of 64", "target_prefix: 64 is outside a vocabulary of 64"),
        ),
        ({"source_prefix": [3], "target_prefix": [2]}, ()),
        ({"target_prefix": [3, 0]}, ("target_prefix: 3 is the end-of-sentence token", "target_prefix: 0 is padding")),
        (
            {"language_tokens": {"tokens": {"en": 9, "de": 64}, "before_source": "source", "before_target": True}},
            ("language_tokens.tokens.de: 64 is outside a vocabulary of 64",),
        ),
        (
            {"language_tokens": {"tokens": {"en": 0, "fr": 3}, "before_source": None, "before_target": True}},
            (
                "language_tokens.tokens.en: 0 is padding",
                "language_tokens.tokens.fr: 3 is the end-of-sentence token",
                "languages: de has no token",
            ),
        ),
        (
            # Its language is English, which no token tells.
            {"language_tokens": {"tokens": {"de": 9}, "before_source": "target", "before_target": False}},
            (),
        ),
        (
            {"defaults": {"min_target_tokens": 9, "max_target_tokens": 8, "suppressed": [[64], [3], [3, 4]]}},
            (
                "defaults.min_target_tokens: 9 is more than a target may have, 8",
                "defaults.suppressed: [64] is outside a vocabulary of 64",
                "defaults.suppressed: [3] is a token that ends targets",
            ),
        ),
        (
            {"defaults": {"suppressed_first": [3, 64], "end_ids": [3, 9, 64, 0, 2]}},
            (
                "defaults.suppressed_first: 64 is outside a vocabulary of 64",
                "defaults.end_ids: 64 is outside a vocabulary of 64",
                "defaults.end_ids: 0 is never decoded",
                "defaults.end_ids: 2 is never decoded",
            ),
        ),
        ({"defaults": {"suppressed_first": [3, 9], "end_ids": [3, 9]}}, ()),
        ({"defaults": {"suppressed": [[3]], "end_ids": [9]}}, ()),
        ({"defaults": {"passed_over_id": 64}}, ("defaults.passed_over_id: 64 is outside a vocabulary of 64",)),
        ({"defaults": {"passed_over_id": 9, "end_ids": [3, 9]}}, ("defaults.passed_over_id: 9 is a token that ends targets",)),
        ({"defaults": {"passed_over_id": 3, "end_ids": [9]}}, ()),
        ({"defaults": {"passed_over_id": 3}}, ("defaults.passed_over_id: 3 is a token that ends targets",)),
        ({"defaults": {"min_target_tokens": 128}}, ("defaults.min_target_tokens: 128 is more than a target may have, 127",)),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_tokens_and_defaults_that_contradict_each_other(
    directory: Path, changes: dict[str, Any], faults: tuple[str, ...]
) -> None:
    write_manifest(directory, manifest_fields() | changes)
    if faults:
        assert faults_of(directory) == tuple(f"manifest.json: {fault}" for fault in faults)
    else:
        read_bundle(directory)


@pytest.mark.parametrize(
    ("before_source", "after_source", "before_target", "size"),
    [("source", None, False, 64), (None, "target", False, 64), (None, None, True, 99), ("source", None, True, 64)],
)
def test_a_languages_token_is_in_the_vocabularies_where_it_is_used(
    directory: Path, before_source: str | None, after_source: str | None, before_target: bool, size: int
) -> None:
    fields = manifest_fields()
    fields["architecture"]["target_vocab_size"] = 99
    places = {"before_source": before_source, "after_source": after_source, "before_target": before_target}
    fields["language_tokens"] = {"tokens": {"en": size - 1, "de": size}, **places}
    write_manifest(directory, fields)
    assert faults_of(directory) == (f"manifest.json: language_tokens.tokens.de: {size} is outside a vocabulary of {size}",)


@pytest.mark.parametrize(
    ("defaults", "fault"),
    [
        ({"length_penalty": 11.0}, "defaults.length_penalty: Input should be less than or equal to 10"),
        ({"length_penalty": float("nan")}, "defaults.length_penalty: Input should be a finite number"),
        ({"repetition_penalty": 0.0}, "defaults.repetition_penalty: Input should be greater than or equal to 0.01"),
        ({"suppressed": [[]]}, "defaults.suppressed.0: List should have at least 1 item after validation, not 0"),
        ({"beam_size": 4}, "defaults.beam_size: Extra inputs are not permitted"),
    ],
    ids=str,
)
def test_defaults_out_of_bounds(directory: Path, defaults: dict[str, Any], fault: str) -> None:
    write_manifest(directory, manifest_fields() | {"defaults": defaults})
    assert faults_of(directory) == (f"manifest.json: {fault}",)


def test_describe_tells_what_the_models_makers_chose() -> None:
    fields = manifest_fields() | {"defaults": {"no_repeat_ngram_size": 3, "early_stopping": True, "length_penalty": 1.0}}
    fields["provenance"]["num_beams"] = 5
    text = describe(Manifest.model_validate(fields))
    assert "  defaults    early_stopping True, no_repeat_ngram_size 3\n" in text
    assert "(weights abababababab), made for 5 beams\n" in text


def _link(path: Path) -> None:
    contents = path.read_bytes()
    path.unlink()
    (path.parent / "elsewhere").write_bytes(contents)
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["manifest.json", "encoder.onnx"])
@pytest.mark.parametrize(
    ("replace", "reason"),
    [
        pytest.param(_link, "is a symbolic link; none is followed", id="link to the same contents"),
        pytest.param(_pipe, "is not a regular file", id="pipe, on which reading would wait"),
        pytest.param(_directory, "is not a regular file", id="directory"),
    ],
)
def test_only_regular_files_are_read(directory: Path, name: str, replace: Callable[[Path], None], reason: str) -> None:
    replace(directory / name)
    assert faults_of(directory) == (f"{name}: {reason}",)


def test_a_file_that_cannot_be_opened_is_a_fault(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.open

    def refuse(path: Path, flags: int) -> int:
        if path.name == "decoder.onnx":
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert faults_of(directory) == ("decoder.onnx: Permission denied",)


def test_the_version_tells_manifests_apart_and_not_their_spelling() -> None:
    fields = manifest_fields()
    version = Manifest.model_validate(fields).version()
    assert len(version) == 12
    assert int(version, 16) >= 0
    assert Manifest.model_validate(dict(reversed(fields.items()))).version() == version
    fields["files"]["decoder.onnx"]["sha256"] = "00" * 32
    assert Manifest.model_validate(fields).version() != version


def test_the_version_stays_the_same_between_releases() -> None:
    assert Manifest.model_validate(manifest_fields()).version() == "b52f7213acdf"


def test_a_bundle_from_before_samples_were_stated(directory: Path) -> None:
    fields = manifest_fields()
    del fields["certificate"]["sample_source"]
    write_manifest(directory, fields)
    manifest = read_bundle(directory).manifest
    assert manifest.certificate.sample_source is None
    # The version that it had when it was written.
    assert manifest.version() == "6b1adaabfa35"
    assert (
        "certificate, measured on 100 sources (whether sentences or random token ids is not stated), 1234 decoded tokens"
        in describe(manifest).splitlines()
    )


def test_describe_says_that_random_ids_are_no_text() -> None:
    fields = manifest_fields()
    fields["certificate"]["sample_source"] = "random_ids"
    assert (
        "certificate, measured on 100 sources of random token ids, not text, 1234 decoded tokens"
        in describe(Manifest.model_validate(fields)).splitlines()
    )


def test_samples_of_no_known_source(directory: Path) -> None:
    fields = manifest_fields()
    fields["certificate"]["sample_source"] = "dreams"
    write_manifest(directory, fields)
    (fault,) = faults_of(directory)
    assert fault.startswith("manifest.json: certificate.sample_source: ")


def test_a_manifest_survives_its_own_json() -> None:
    manifest = Manifest.model_validate(manifest_fields())
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize("difference", [float("nan"), float("inf"), -1.0])
def test_a_difference_that_is_no_measurement_is_refused(difference: float) -> None:
    with pytest.raises(ValidationError, match="max_abs_logit_difference"):
        Comparison(reference="PyTorch", max_abs_logit_difference=difference, token_agreement=1.0, tolerance=None)


def test_describe() -> None:
    fields = manifest_fields()
    fields["files"]["encoder.onnx"]["bytes"] = 4_567_890
    fields["files"]["decoder.onnx"]["bytes"] = 12_345_678
    manifest = Manifest.model_validate(fields)
    assert describe(manifest).splitlines() == [
        "  name        tiny",
        f"  version     {manifest.version()}",
        "  precision   int8",
        "  languages   en -> de",
        "  model       2 encoder and 1 decoder layers, d_model 16, 2 heads of 8",
        "  vocabulary  64 source, 64 target",
        "  limits      128 source tokens, 127 target tokens, beams of 16, 33 candidates a step",
        "  defaults    the usual",
        "  tokenizer   sentencepiece (sentencepiece.model)",
        "  checkpoint  tiny-checkpoint (weights abababababab)",
        "  made by     onnxlate 0.1.0, torch 2.13.0, ONNX opset 20",
        "  format      revision 4",
        "",
        "files",
        "                       MB     sha256",
        "  decoder.onnx         12.35  d8ee1d0f15d6",
        "  encoder.onnx         4.57   8cabf23c1701",
        "  sentencepiece.model  0.00   b6aa423de4f7",
        "",
        "certificate, measured on 100 sentences, 1234 decoded tokens",
        "                  against       largest logit difference  tolerance  same tokens",
        "  cached_pytorch  full pass     1.00e-06                  1e-03      100.00%",
        "  onnx_int8       PyTorch fp32  2.50e-01                  none       98.76%",
    ]


@pytest.mark.parametrize(
    ("int8_scales", "told"), [("constant", "int8, constant scales"), ("row", "int8, a scale for each row, found at run time")]
)
def test_describe_tells_the_scales(int8_scales: str, told: str) -> None:
    manifest = Manifest.model_validate(manifest_fields() | {"int8_scales": int8_scales})
    assert f"  precision   {told}" in describe(manifest).splitlines()


@pytest.mark.parametrize("kind", [None, "words"])
def test_a_tokenizer_of_no_known_kind(directory: Path, kind: str | None) -> None:
    fields = manifest_fields()
    if kind is None:
        del fields["tokenizer"]["kind"]
    else:
        fields["tokenizer"]["kind"] = kind
    write_manifest(directory, fields)
    (fault,) = faults_of(directory)
    assert fault.startswith("manifest.json: tokenizer.kind: ")


def test_the_files_of_a_marian_tokenizer_are_needed(directory: Path) -> None:
    fields = manifest_fields()
    fields["tokenizer"] = {
        "kind": "marian",
        "source_model": "sentencepiece.model",
        "target_model": "sentencepiece.model",
        "source_vocabulary": "vocab.json",
        "target_vocabulary": "vocab.json",
    }
    write_manifest(directory, fields)
    assert faults_of(directory) == ("vocab.json: needed, and not among the bundle's files",)


def test_describe_without_languages_and_with_two_tokenizer_files() -> None:
    fields = manifest_fields()
    fields["languages"] = []
    fields["tokenizer"]["target_model"] = "target.model"
    text = describe(Manifest.model_validate(fields))
    assert "  languages   not stated\n" in text
    assert "(sentencepiece.model, target.model)\n" in text
