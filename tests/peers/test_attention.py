"""Attention and unknown words against CTranslate2: the same layer and heads, the same numbers, the same words put in.

Each of our answers is compared with CTranslate2's own, so that both have searched for it as well.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.attended import AttendedSource, attended_target
from serving.request import DecodingOptions, Hypothesis
from serving.tokenizers import load_tokenizer
from tests.peers.subject import Subject
from tests.peers.test_ctranslate2_import import Imported, fill, imported

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
# Of random models, whose scores are large: some attend to one token alone.
RANDOM_TOLERANCE = 3e-4
LIMIT = 24
GREEDY = DecodingOptions(max_target_tokens=LIMIT, length_penalty=0.0, return_attention=True)
BEAMS = dataclasses.replace(GREEDY, beam_size=4, num_hypotheses=4, length_penalty=1.0, early_stopping=True)
PREFIX = (40, 41, 42)
# Layer and number of heads as CTranslate2's files state them.
ALIGNMENTS = {"first head of the last layer": (-1, 1), "all heads of the last": (-1, 0), "two heads of the first": (0, 2)}


def converter(layer: int, heads: int) -> Any:
    """Writes a random model that tells this attention, and whose targets have unknown tokens."""

    def write(directory: Path, stored: str) -> None:
        special = ["<unk>", "<blank>", "<s>", "</s>"]
        source, target = ([*special, *(f"{letter}{i}" for i in range(200))] for letter in "st")
        specs = ctranslate2.specs
        spec = specs.TransformerSpec.from_config(
            (2, 3), 4, pre_norm=True, activation=specs.Activation.RELU, alignment_layer=layer, alignment_heads=heads
        )
        fill(spec, len(source), len(target), positions=True)
        spec.decoder.projection.bias[0] = UNKNOWN_LOGIT
        spec.register_source_vocabulary(source)
        spec.register_target_vocabulary(target)
        spec.config.add_source_eos = True
        spec.validate()
        spec.optimize(quantization=stored)
        directory.mkdir()
        spec.save(str(directory))

    return write


# An output bias of the unknown token that makes it come now and then.
UNKNOWN_LOGIT = 14.0


@pytest.fixture(scope="module", params=ALIGNMENTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    work = tmp_path_factory.mktemp("attention")
    return imported((request.param, converter(*ALIGNMENTS[request.param])), work, "float32")


def theirs(case: Imported, sources: list[tuple[int, ...]], options: DecodingOptions, **more: Any) -> list[Any]:
    pieces = case.target_pieces
    prefix = [pieces[i] for i in options.target_prefix]
    translator = ctranslate2.Translator(str(case.directory), compute_type="float32", intra_threads=1)
    results: list[Any] = translator.translate_batch(
        [case.spelled(source) for source in sources],
        [prefix] * len(sources) if prefix else None,
        beam_size=options.beam_size,
        num_hypotheses=options.num_hypotheses,
        length_penalty=options.length_penalty,
        max_decoding_length=options.max_target_tokens,
        # With beams, the first token of a batch's sentences has another sentence's attention there.
        max_batch_size=1,
        **more,
    )
    return results


def check(
    ours: list[tuple[Hypothesis, ...]], found: list[Any], pieces: list[str], case: Imported, sources: list[tuple[int, ...]]
) -> None:
    apart, compared = 0.0, 0
    for mine, its, source in zip(ours, found, sources, strict=True):
        by_tokens = dict(zip((tuple(tokens) for tokens in its.hypotheses), its.attention, strict=True))
        for hypothesis in mine:
            assert hypothesis.attention is not None
            attention = by_tokens.get(tuple(pieces[i] for i in hypothesis.target_ids))
            if attention is None:
                continue
            expected = np.array(attention).reshape(len(hypothesis.target_ids), -1)
            given = len(case.spelled(source))
            assert expected.shape[1] in (0, given)
            if expected.size:
                apart = max(apart, float(np.abs(hypothesis.attention[:, :given] - expected).max()))
            compared += 1
    total = sum(len(mine) for mine in ours)
    print(f"attention of {compared} of {total} hypotheses, at most {apart:.1e} apart")
    assert compared > 0.9 * total
    assert apart <= RANDOM_TOLERANCE


@pytest.mark.parametrize("prefix", [(), PREFIX], ids=["free", "prefix"])
@pytest.mark.parametrize("base", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_attention_is_the_same(case: Imported, base: DecodingOptions, prefix: tuple[int, ...]) -> None:
    sources = case.sources(40)
    options = dataclasses.replace(base, target_prefix=prefix)
    found = theirs(case, sources, options, return_attention=True)
    check(case.subject.decode(sources, options), found, case.target_pieces, case, sources)


def test_it_is_another_of_another_layer_and_other_heads(case: Imported, tmp_path: Path) -> None:
    """So that the tests before this one can fail."""
    write = converter(*next(alignment for name, alignment in ALIGNMENTS.items() if alignment != alignment_of(case)))
    other = imported(("other", write), tmp_path, "float32")
    sources = case.sources(5)
    for mine, its in zip(case.subject.decode(sources, GREEDY), other.subject.decode(sources, GREEDY), strict=True):
        assert mine == its
        assert mine[0].attention is not None
        assert its[0].attention is not None
        if mine[0].target_ids:
            assert np.abs(mine[0].attention - its[0].attention).max() > 100 * RANDOM_TOLERANCE


def alignment_of(case: Imported) -> tuple[int, int]:
    config = case.subject.checkpoint.config
    assert config.alignment_layer is not None
    layer = config.alignment_layer
    return (-1 if layer == config.num_decoder_layers - 1 else layer), config.alignment_heads or 0


def test_attention_of_a_model_of_hugging_faces(subject: Subject, marian_directory: Path, tmp_path: Path) -> None:
    """Its tokens are all given, the end of the sentence too."""
    from benchmarks.conversion import convert_without_padding_rules, pieces_of

    pieces = pieces_of(subject.checkpoint)
    directory = convert_without_padding_rules(marian_directory, pieces, tmp_path / "peer", "fp32")
    translator = ctranslate2.Translator(str(directory), compute_type="float32", intra_threads=1)
    sources = subject.sources()[:60]
    found = translator.translate_batch(
        [[pieces[i] for i in source] for source in sources],
        beam_size=4,
        num_hypotheses=4,
        max_decoding_length=LIMIT,
        return_attention=True,
        max_batch_size=1,
    )
    apart, compared = 0.0, 0
    for mine, its in zip(subject.decode(sources, BEAMS), found, strict=True):
        by_tokens = dict(zip((tuple(tokens) for tokens in its.hypotheses), its.attention, strict=True))
        for hypothesis in mine:
            attention = by_tokens.get(tuple(pieces[i] for i in hypothesis.target_ids))
            if attention and hypothesis.attention is not None:
                apart = max(apart, float(np.abs(hypothesis.attention - np.array(attention)).max()))
                compared += 1
    print(f"{subject.checkpoint.name}: attention of {compared} hypotheses, at most {apart:.1e} apart")
    assert compared > 100
    assert apart <= TOLERANCE


@pytest.mark.parametrize("base", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_unknown_tokens_become_the_same_words(case: Imported, base: DecodingOptions) -> None:
    tokenizer = load_tokenizer(case.subject.bundle("fp32"))
    rng = np.random.default_rng(3)
    # Every sixth word is one that the source vocabulary does not have either; it may be put in all the same.
    texts = [" ".join(f"{'s?????'[i % 6]}{i}" for i in rng.integers(0, 200, rng.integers(1, 20))) for _ in range(40)]
    texts = [text.replace("?", "s", text.count("?") // 2) for text in texts]
    eos_id = case.subject.checkpoint.config.eos_id
    ours = case.subject.decode([(*tokenizer.encode(text), eos_id) for text in texts], base)
    translator = ctranslate2.Translator(str(case.directory), compute_type="float32", intra_threads=1)
    found = translator.translate_batch(
        [text.split() for text in texts],
        beam_size=base.beam_size,
        num_hypotheses=base.num_hypotheses,
        length_penalty=base.length_penalty,
        max_decoding_length=LIMIT,
        max_batch_size=1,
        replace_unknowns=True,
    )
    replaced = unknown_to_both = 0
    for text, mine, its in zip(texts, ours, found, strict=True):
        source = AttendedSource(
            pieces=tuple(tokenizer.source_pieces(text)), tokens_before=0, is_told=True, replaces_unknowns=True
        )
        targets = [attended_target(hypothesis, source, tokenizer) for hypothesis in mine]
        assert [list(target.pieces) for target in targets] == its.hypotheses
        words = [piece for target in targets for piece in target.pieces if piece in text.split()]
        replaced += len(words)
        unknown_to_both += sum(word.startswith("?") for word in words)
    print(f"{replaced} unknown tokens became words of the source, {unknown_to_both} of which are in neither vocabulary")
    assert unknown_to_both >= 5
    assert replaced >= unknown_to_both + 10
