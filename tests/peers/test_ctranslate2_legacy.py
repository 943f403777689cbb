"""CTranslate2's oldest model files, which it still loads: the very files it translates with are read here, to the same answers.

No published converter writes them any more: weights of a ``TransformerSpec`` are laid out as the first versions did
(``tests/ctranslate2_files.py``), and CTranslate2 of today is what says whether that is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from serving.request import DecodingOptions
from tests.ctranslate2_files import legacy_binary, opennmt_tf_name
from tests.export.test_ctranslate2 import binary, flag
from tests.peers.subject import Subject
from tests.peers.test_ctranslate2_import import fill

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

LOG_PROB_TOLERANCE = 1e-3
NUM_SOURCES = 60
MAX_TARGET_TOKENS = 24
LEAST_DIFFERENT_TARGETS = 10
# As OpenNMT-tf writes vocabularies: without the unknown token, which is the row after the last.
SOURCE_TOKENS = ["<blank>", "<s>", "</s>", *(f"s{i}" for i in range(250))]
TARGET_TOKENS = ["<blank>", "<s>", "</s>", *(f"t{i}" for i in range(300))]
UNLIKELY = -30.0

Weights = Mapping[str, Any]


def weights(heads: int = 8) -> Weights:
    """Of a pre-norm model without a table of positions."""
    spec = ctranslate2.specs.TransformerSpec.from_config((2, 3), heads)
    fill(spec, len(SOURCE_TOKENS) + 1, len(TARGET_TOKENS) + 1, positions=False, d_model=8 * heads)
    # What never comes, and what should, are other rows than those that were filled in for.
    bias = spec.decoder.projection.bias
    bias[:3] = UNLIKELY, UNLIKELY, bias[3]
    bias[3], bias[-1] = 0, UNLIKELY
    return {name: values for name, values in spec.variables(ordered=True) if isinstance(values, np.ndarray) and values.ndim}


def int16(found: Weights) -> Weights:
    """Integers of which 1000 is 1, as the first quantized files have them, without a scale."""
    return {
        name: np.rint(values * 1000).astype(np.int16) if name.endswith("weight") else values for name, values in found.items()
    }


def int8(found: Weights) -> Weights:
    """Integers with a scale a row."""
    stored: dict[str, Any] = dict(found)
    for name, values in found.items():
        if name.endswith("weight"):
            scale = (127 / np.abs(values).max(axis=1)).astype(np.float32)
            stored |= {name: np.rint(values * scale[:, None]).astype(np.int8), f"{name}_scale": scale}
    return stored


def first(found: Weights) -> bytes:
    return legacy_binary({opennmt_tf_name(name): values for name, values in found.items()}, version=1)


def second(found: Weights, spec: str) -> bytes:
    return legacy_binary(found, version=2, spec=spec, revision=2)


def third(found: Weights) -> bytes:
    settings = {"num_heads": flag(4), "with_relative_position": flag(0)}
    return legacy_binary({**found, **settings}, version=3, revision=3)


def fourth(found: Weights) -> bytes:
    stated = {
        "num_heads": flag(4),
        "pre_norm": flag(1),
        "activation": flag(2),
        "with_relative_position": flag(0),
        "embeddings_merge": flag(0),
        "layernorm_embedding": flag(0),
        "alignment_layer": np.array(1, np.int16),
        "alignment_heads": np.array(2, np.int16),
        "with_source_eos": flag(1),
    }
    return binary({**found, **stated}, version=5, revision=4)


FILES = {
    "first version": lambda: first(weights()),
    "first version, int16": lambda: first(int16(weights())),
    "second version, base": lambda: second(weights(), "TransformerBase"),
    "second version, big": lambda: second(weights(heads=16), "TransformerBig"),
    "second version, int16": lambda: second(int16(weights()), "TransformerBase"),
    "second version, int8": lambda: second(int8(weights()), "TransformerBase"),
    "third version": lambda: third(weights()),
    "fifth version, fourth revision": lambda: fourth(weights()),
}


@pytest.fixture(scope="module", params=FILES)
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    work = tmp_path_factory.mktemp("old")
    directory = work / "model"
    directory.mkdir()
    (directory / "model.bin").write_bytes(FILES[request.param]())
    for side, tokens in (("source", SOURCE_TOKENS), ("target", TARGET_TOKENS)):
        (directory / f"{side}_vocabulary.txt").write_text("".join(f"{token}\n" for token in tokens))
    (directory / "samples.txt").write_text("".join(f"{' '.join(SOURCE_TOKENS[i : i + 5])}\n" for i in (10, 20, 30)))
    # Of no consequence where nobody asks for it.
    (directory / "vmap.txt").write_text("s1\tt1 t2\n")
    return Subject(directory, work)


def sources(subject: Subject) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(1)
    checkpoint = subject.checkpoint
    end = (checkpoint.config.eos_id,) if checkpoint.source_ends_with_eos else ()
    return [(*rng.choice(range(3, 253), rng.integers(1, 20)).tolist(), *end) for _ in range(NUM_SOURCES)]


@pytest.mark.parametrize("beam_size", [1, 4])
def test_translations_are_the_same(old: Subject, beam_size: int) -> None:
    translator = ctranslate2.Translator(str(old.directory), compute_type="float32", intra_threads=1)
    asked = sources(old)
    found = translator.translate_batch(
        [[SOURCE_TOKENS[i] for i in source if i != old.checkpoint.config.eos_id] for source in asked],
        beam_size=beam_size,
        length_penalty=0,
        min_decoding_length=0,
        max_decoding_length=MAX_TARGET_TOKENS,
        return_scores=True,
    )
    options = DecodingOptions(
        beam_size=beam_size, length_penalty=0, max_target_tokens=MAX_TARGET_TOKENS, early_stopping=True, return_scores=True
    )
    ours = [hypotheses[0] for hypotheses in old.decode(asked, options)]
    theirs = [tuple(TARGET_TOKENS.index(token) for token in result.hypotheses[0]) for result in found]
    assert len({*theirs}) >= LEAST_DIFFERENT_TARGETS
    assert [hypothesis.target_ids for hypothesis in ours] == theirs
    apart = [abs(mine.score - its.scores[0]) for mine, its in zip(ours, found, strict=True) if mine.score is not None]
    assert len(apart) == NUM_SOURCES
    assert max(apart) <= LOG_PROB_TOLERANCE


def test_attention_is_of_the_same_heads(old: Subject) -> None:
    translator = ctranslate2.Translator(str(old.directory), compute_type="float32", intra_threads=1)
    (source, *_) = sources(old)
    end = old.checkpoint.config.eos_id
    (theirs,) = translator.translate_batch(
        [[SOURCE_TOKENS[i] for i in source if i != end]], beam_size=1, max_decoding_length=8, return_attention=True
    )
    ((ours,),) = old.decode([source], DecodingOptions(max_target_tokens=8, return_attention=True))
    assert ours.attention is not None
    columns = len(theirs.attention[0][0])
    np.testing.assert_allclose(np.asarray(ours.attention)[:, :columns], theirs.attention[0], atol=1e-4)
