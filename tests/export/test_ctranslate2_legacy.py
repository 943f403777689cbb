"""CTranslate2's models of binary versions 1 to 3 and of the first revisions of its specification."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import build_model, read_checkpoint
from serving.tokenizers import open_tokenizer
from tests.ctranslate2_files import legacy_binary, opennmt_tf_name, string
from tests.export.test_ctranslate2 import D_MODEL, TOKENS, Variables, binary, faults_of, flag, variables

# As OpenNMT-tf writes them: the unknown token is the row after the last.
OPENNMT_TF_TOKENS = ["<blank>", "<s>", "</s>", *(f"t{i}" for i in range(20))]
# In files of the first revisions, which state nothing, positions are computed.
WITHOUT_POSITIONS = {name: values for name, values in variables().items() if "position_encodings" not in name}
WEIGHTS = {name: values for name, values in WITHOUT_POSITIONS.items() if values.shape}


def of_opennmt_tf(found: Variables) -> Variables:
    return {opennmt_tf_name(name): values for name, values in found.items()}


def stated_once(found: Variables, **settings: Any) -> Variables:
    """With settings of both sides under one name, as before revision 5."""
    return {name: values for name, values in found.items() if values.shape} | settings


def write(directory: Path, contents: bytes, tokens: list[str] = OPENNMT_TF_TOKENS) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "model.bin").write_bytes(contents)
    for side in ("source", "target"):
        (directory / f"{side}_vocabulary.txt").write_text("".join(f"{token}\n" for token in tokens))
    return directory


def test_the_first_version_has_the_names_of_opennmt_tf(tmp_path: Path) -> None:
    found = of_opennmt_tf(WEIGHTS)
    assert "transformer/encoder/layer_1/multi_head/conv1d/kernel:0" in found
    assert "transformer/decoder/layer_0/masked_multi_head/LayerNorm/gamma:0" in found
    assert "transformer/decoder/layer_0/multi_head/conv1d_2/bias:0" in found
    checkpoint = read_checkpoint(write(tmp_path / "en-de", legacy_binary(found, version=1)))
    config = checkpoint.config
    assert (config.num_heads, config.num_encoder_layers, config.num_decoder_layers) == (8, 2, 1)
    assert (config.norm, config.activation, config.scale_embedding, config.max_positions) == ("pre", "relu", True, 1024)
    assert not checkpoint.source_ends_with_eos
    assert (config.pad_id, config.decoder_start_id, config.eos_id) == (0, 1, 2)
    tensors = build_model(checkpoint).state_dict()
    fused = torch.from_numpy(WEIGHTS["decoder/layer_0/attention/linear_1/weight"])
    assert torch.equal(tensors["decoder.layers.0.cross_attention.value.weight"], fused[D_MODEL:])
    fused = torch.from_numpy(WEIGHTS["decoder/layer_0/self_attention/linear_0/weight"])
    assert torch.equal(tensors["decoder.layers.0.self_attention.query.weight"], fused[:D_MODEL])
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("t0 t19 what") == [3, 22, 23]


def same_as_today(checkpoint: Path, found: Variables, tmp_path: Path) -> None:
    """Whether an old file's tensors are those of the same variables in a new one, numbers of heads aside."""
    today = tmp_path / "today"
    write(today, binary(found), TOKENS)
    (today / "config.json").write_text("{}")
    ours, theirs = read_checkpoint(checkpoint), read_checkpoint(today)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name


@pytest.mark.parametrize(("spec", "heads"), [("TransformerBase", 8), ("TransformerBig", 16), ("", 8)])
def test_heads_of_the_second_revision_follow_from_its_name(tmp_path: Path, spec: str, heads: int) -> None:
    directory = write(tmp_path / "m", legacy_binary(WEIGHTS, version=2, spec=spec, revision=2), TOKENS)
    assert read_checkpoint(directory).config.num_heads == heads
    same_as_today(directory, WITHOUT_POSITIONS, tmp_path)


def test_a_stated_number_of_heads_counts_more_than_a_name(tmp_path: Path) -> None:
    contents = legacy_binary(WEIGHTS | {"num_heads": flag(4)}, version=2, spec="TransformerBase", revision=2)
    assert read_checkpoint(write(tmp_path / "m", contents, TOKENS)).config.num_heads == 4


def test_the_third_version_has_aliases(tmp_path: Path) -> None:
    found = stated_once(WEIGHTS, num_heads=flag(2), with_relative_position=flag(0))
    name, alias = "decoder/embeddings/weight", "decoder/projection/weight"
    del found[alias]
    directory = write(tmp_path / "m", legacy_binary(found, {alias: name}, version=3), TOKENS)
    assert read_checkpoint(directory).config.tie_output
    same_as_today(directory, {**WITHOUT_POSITIONS, alias: WITHOUT_POSITIONS[name]}, tmp_path)


@pytest.mark.parametrize("names", ["OpenNMT-tf's", "later"])
def test_types_follow_from_the_width_of_a_value(tmp_path: Path, names: str) -> None:
    stored = dict(WEIGHTS)
    first, second = "encoder/layer_0/ffn/linear_0/weight", "decoder/layer_0/ffn/linear_1/weight"
    stored[first] = np.rint(stored[first] * 1000).astype(np.int16)
    if names == "later":
        scale = (127 / np.abs(stored[second]).max(axis=1)).astype(np.float32)
        stored[second] = np.rint(stored[second] * scale[:, None]).astype(np.int8)
        stored[f"{second}_scale"] = scale
    contents = (
        legacy_binary(stored, version=2, spec="TransformerBase", revision=2)
        if names == "later"
        else legacy_binary(of_opennmt_tf(stored), version=1)
    )
    directory = write(tmp_path / "m", contents, TOKENS)
    same_as_today(directory, WITHOUT_POSITIONS | stored, tmp_path)


def test_settings_of_the_fourth_revision(tmp_path: Path) -> None:
    found = stated_once(
        WEIGHTS,
        num_heads=flag(2),
        pre_norm=flag(1),
        activation=flag(2),
        alignment_layer=np.array(0, np.int16),
        alignment_heads=np.array(2, np.int16),
        embeddings_merge=flag(0),
        with_relative_position=flag(0),
        layernorm_embedding=flag(0),
    )
    config = read_checkpoint(write(tmp_path / "m", binary(found, version=5, revision=4), TOKENS)).config
    assert (config.num_heads, config.activation) == (2, "silu")
    assert (config.alignment_layer, config.alignment_heads) == (0, 2)


def test_tokens_that_cannot_be_seen(tmp_path: Path) -> None:
    # One token a line, whatever it is; only a line feed ends one.
    tokens = [*OPENNMT_TF_TOKENS[:-4], "", "\u00a0", "\u200c", "\u2028"]
    checkpoint = read_checkpoint(write(tmp_path / "m", legacy_binary(of_opennmt_tf(WEIGHTS), version=1), tokens))
    ids = json.loads(bytes(checkpoint.tokenizer_files["vocabulary.json"]))
    assert [ids[token] for token in tokens[-4:]] == [19, 20, 21, 22]
    tokenizer = open_tokenizer(checkpoint.tokenizer, checkpoint.tokenizer_files)
    assert tokenizer.encode("t0 \u200c") == [3, 21]
    assert tokenizer.decode([3, 21, 19, 4]) == "t0 \u200c t1"


def test_a_map_of_vocabularies_is_not_looked_at(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", legacy_binary(of_opennmt_tf(WEIGHTS), version=1))
    without = read_checkpoint(directory)
    (directory / "vmap.txt").write_bytes(b"\xff\tnothing")
    beside = read_checkpoint(directory)
    assert (beside.config, beside.tokenizer_files, beside.warnings) == (without.config, without.tokenizer_files, without.warnings)
    assert beside.tensors.keys() == without.tensors.keys()
    assert all(torch.equal(tensor, without.tensors[name]) for name, tensor in beside.tensors.items())


def test_vocabularies_with_the_ends_of_lines_of_windows(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", legacy_binary(of_opennmt_tf(WEIGHTS), version=1))
    (directory / "source_vocabulary.txt").write_bytes("".join(f"{token}\r\n" for token in OPENNMT_TF_TOKENS).encode())
    files = read_checkpoint(directory).tokenizer_files
    assert json.loads(bytes(files["vocabulary.json"]))["t19"] == 22


FIRST, THIRD = legacy_binary(of_opennmt_tf(WEIGHTS), version=1), legacy_binary(WEIGHTS, version=3)
TWO = {"transformer/encoder/w_embs:0": flag(0), "encoder/w_embs": flag(0)}


@pytest.mark.parametrize(
    ("contents", "fault"),
    [
        pytest.param(struct.pack("<I", 1), "ends within a number, at byte 4", id="cut before the variables"),
        pytest.param(struct.pack("<II", 1, 2**32 - 1), "ends within a number, at byte 8", id="absurdly many variables"),
        pytest.param(
            FIRST[:-1],
            f"ends within the values of transformer/decoder/layer_0/ffn/LayerNorm/beta:0, at byte {len(FIRST) - 1}",
            id="cut within values",
        ),
        pytest.param(FIRST + bytes(4), "ends with 4 bytes that belong to nothing", id="too long"),
        pytest.param(THIRD[:-4], f"ends within a number, at byte {len(THIRD) - 4}", id="cut before the aliases"),
        pytest.param(
            legacy_binary({"x": np.zeros(2)}, version=1),
            "x: of values of 8 bytes, which are of no known type",
            id="width of no type",
        ),
        pytest.param(
            struct.pack("<II", 1, 1) + string("x") + struct.pack("<BIIBI", 2, 2**31, 2**31, 4, 2) + bytes(8),
            "x: of 8 bytes, but float32 of shape [2147483648, 2147483648] takes 18446744073709551616",
            id="absurd shape",
        ),
        pytest.param(
            struct.pack("<II", 1, 1) + string("x") + struct.pack("<BIBI", 1, 2**32 - 1, 4, 2**32 - 1) + bytes(8),
            "ends within the values of x, at byte 30",
            id="absurd number of values",
        ),
        pytest.param(
            legacy_binary(TWO, version=1), "two variables are the same one by the names of OpenNMT-tf", id="the same names"
        ),
        pytest.param(
            legacy_binary({}, version=2, spec="TransformerBase", revision=3),
            "revision 3 of TransformerBase is not supported, only 1 to 2",
            id="revision of an old name",
        ),
        pytest.param(
            legacy_binary({}, version=2, spec="TransformerSpec", revision=2),
            "revision 2 of TransformerSpec is not supported, only 3 to 7",
            id="too old for a new name",
        ),
        pytest.param(THIRD, "encoder/num_heads: missing", id="no number of heads"),
    ],
)
def test_old_files_that_are_broken(tmp_path: Path, contents: bytes, fault: str) -> None:
    assert faults_of(write(tmp_path / "m", contents, TOKENS)) == (f"model.bin: {fault}",)


def test_a_file_that_ends_anywhere_is_refused(tmp_path: Path) -> None:
    small = legacy_binary({"a": np.zeros(2, np.float32), "b": flag(1)}, {"c": "a"}, version=3)
    for length in range(1, len(small)):
        (fault,) = faults_of(write(tmp_path / "m", small[:length], TOKENS))
        assert fault.startswith("model.bin: ends within"), length
