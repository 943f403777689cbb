"""What requests ask of targets, from text to text, against CTranslate2 on the same Marian model with its real tokenizer.

Ours is the whole way of a text: ``preparation``, the engine, detokenization. Its tokens are CTranslate2's of what Hugging Face's
tokenizer makes of source and prefix; forms inside of a word are SentencePiece's own without its first space. ``early_stopping``
is CTranslate2's rule of when a beam search ends.
"""

from __future__ import annotations

import gzip
import importlib
import math
import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.conversion import make_ends_likely, write_ctranslate2
from export.pipeline import export_bundle
from serving.config import EngineConfig, RequestLimits
from serving.manifest import DefaultOptions
from serving.model import ServedModel, load_model
from serving.observer import NullObserver
from serving.preparation import Translation
from serving.request import FinishReason, Outcome
from serving.request_options import RequestOptions
from tests.fakes import PATIENCE_S
from tests.peers.test_marian import REAL, SHARED, captions, there, tokenizer_of
from tests.support import GERMAN_LINES

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

SENTENCES = 40
LIMIT = 40
SPACE = "\u2581"
SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pair:
    """One model twice."""

    ours: ServedModel
    theirs: Any
    # Hugging Face's.
    tokenizer: Any
    target_model: bytes
    sources: tuple[str, ...]
    # What some translation starts with; for some texts nothing.
    prefixes: tuple[str, ...]

    def pieces(self, text: str, *, is_target: bool = False) -> list[str]:
        """Without the end-of-sentence token."""
        ids = self.tokenizer(text_target=text)["input_ids"] if is_target else self.tokenizer(text)["input_ids"]
        pieces: list[str] = self.tokenizer.convert_ids_to_tokens(ids[:-1])
        return pieces

    def forms(self, text: str) -> list[list[str]]:
        """The pieces of a text after a space and inside of a word, by SentencePiece alone."""
        model: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(self.target_model)
        model.normalizer_spec.add_dummy_prefix = False
        inside = importlib.import_module("sentencepiece").SentencePieceProcessor(model_proto=model.SerializeToString())
        return [self.pieces(text, is_target=True), inside.encode(text, out_type=str)]

    def translate(
        self, options: RequestOptions, prefixes: Sequence[str] | None = None
    ) -> tuple[list[tuple[int, ...]], list[Translation]]:
        """Ids of our best hypotheses, and our answers."""
        preparer, outcomes = self.ours.preparer, queue.Queue[tuple[int, Outcome]]()
        preparer.check_options(options)
        tokens, sequences = preparer.target_tokens(options), []
        for place, text in enumerate(self.sources):
            source = preparer.source_ids(text, f"texts[{place}]", max_tokens=options.max_source_tokens)
            prefix = prefixes[place] if prefixes else ""
            sequence = preparer.sequence(
                source,
                options,
                place=place,
                tokens=tokens,
                prefix=preparer.prefix_ids(prefix, f"target_prefixes[{place}]", options, len(source)),
                arrived_at_s=time.monotonic(),
                expires_at_s=math.inf,
                on_outcome=partial(_put, outcomes, place),
            )
            sequences.append(sequence)
        self.ours.engine.submit(sequences)
        found = dict(outcomes.get(timeout=10 * PATIENCE_S) for _ in sequences)
        ids = [found[place].hypotheses[0].target_ids for place in range(len(sequences))]
        return ids, [preparer.translation(len(one.source_ids), found[place]) for place, one in enumerate(sequences)]

    def translate_by_peer(self, options: RequestOptions, prefixes: Sequence[str] | None = None, **more: Any) -> list[list[str]]:
        """Tokens of CTranslate2's best hypotheses; ``more`` are its own options."""
        return [result.hypotheses[0] for result in self.results_of_peer(options, prefixes, **more)]

    def results_of_peer(self, options: RequestOptions, prefixes: Sequence[str] | None = None, **more: Any) -> list[Any]:
        """CTranslate2's answers."""
        asked: dict[str, Any] = {"max_decoding_length": LIMIT, "min_decoding_length": 0, **more}
        results: list[Any] = self.theirs.translate_batch(
            [[*self.pieces(text), "</s>"] for text in self.sources],
            None if prefixes is None else [self.pieces(prefix, is_target=True) if prefix else None for prefix in prefixes],
            beam_size=options.beam_size or 1,
            return_scores=bool(options.return_scores),
            **asked,
        )
        return results

    def spelled(self, token_id: int) -> str:
        """A token as the vocabulary spells it."""
        piece: str = self.tokenizer.convert_ids_to_tokens(token_id)
        return piece


def _put(outcomes: queue.Queue[tuple[int, Outcome]], place: int, outcome: Outcome) -> None:
    outcomes.put((place, outcome))


def random_marian(directory: Path) -> None:
    """Small, with the vocabulary of a real model; hypotheses end, and some hold the unknown token."""
    config = transformers.MarianConfig.from_pretrained(REAL["en-mg"])
    config.encoder_layers = config.decoder_layers = 1
    config.init_std = 0.05
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.MarianMTModel(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            make_ends_likely(model)
            model.final_logits_bias.normal_()
            model.final_logits_bias[0, 1] += 5.0
    model.save_pretrained(directory)


@pytest.fixture(scope="module", params=["trained", "random"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    work = tmp_path_factory.mktemp(f"targets-{request.param}")
    directory = work / "marian"
    directory.mkdir()
    for path in there(REAL["trained" if request.param == "trained" else "en-mg"]).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    if request.param == "random":
        random_marian(directory)
    lines = captions()[:SENTENCES]
    (directory / "samples.txt").write_text("\n".join(lines[:4]))
    write_ctranslate2(directory, work / "ctranslate2", "fp32")
    bundle = export_bundle(directory, work / "bundle", precision="fp32", show_progress=False)
    limits = RequestLimits()
    ours = load_model(bundle.directory, EngineConfig(threads=1), limits, NullObserver())
    # CTranslate2 takes no notice of what the model says of generate.
    ours = replace(ours, preparer=replace(ours.preparer, defaults=DefaultOptions()))
    if request.param == "trained":
        references = gzip.decompress(there(SHARED / "data/multi30k/test_2016_flickr.de.gz").read_bytes()).decode().splitlines()
    else:
        references = list(GERMAN_LINES) * 2
    prefixes = [" ".join(line.split()[: place % 4]) for place, line in enumerate(references[:SENTENCES])]
    try:
        yield Pair(
            ours=ours,
            theirs=ctranslate2.Translator(str(work / "ctranslate2"), compute_type="float32", intra_threads=1),
            tokenizer=tokenizer_of(directory),
            target_model=(directory / "target.spm").read_bytes(),
            sources=tuple(lines),
            prefixes=tuple(prefixes),
        )
    finally:
        ours.engine.close()


def asked(beam_size: int, **options: Any) -> RequestOptions:
    early_stopping = True if beam_size > 1 else None
    return RequestOptions(**{"beam_size": beam_size, "early_stopping": early_stopping, "max_target_tokens": LIMIT, **options})


def check(pair: Pair, ids: list[tuple[int, ...]], theirs: list[list[str]], *, most_different: float = 0.0) -> None:
    spelled = [pair.tokenizer.convert_tokens_to_ids(pieces) for pieces in theirs]
    different = [(mine, its) for mine, its in zip(map(list, ids), spelled, strict=True) if mine != its]
    assert len(different) <= most_different * len(ids), different


def changed(pair: Pair, beam_size: int, ids: list[tuple[int, ...]]) -> bool:
    """Whether an option did anything at all."""
    plain, _ = pair.translate(asked(beam_size))
    return plain != ids


BEAM_SIZES = pytest.mark.parametrize("beam_size", [1, 4])


@BEAM_SIZES
def test_prefixes_are_forced(pair: Pair, beam_size: int) -> None:
    options = asked(beam_size)
    ids, translations = pair.translate(options, pair.prefixes)
    check(pair, ids, pair.translate_by_peer(options, pair.prefixes))
    assert changed(pair, beam_size, ids)
    for prefix, translation, mine in zip(pair.prefixes, translations, ids, strict=True):
        (best,) = translation.hypotheses
        assert best.text.startswith(prefix)
        assert best.text == pair.tokenizer.decode(mine, skip_special_tokens=True)


@BEAM_SIZES
@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_prefixes_pull(pair: Pair, beam_size: int, strength: float) -> None:
    options = asked(beam_size, prefix_bias=strength)
    ids, _ = pair.translate(options, pair.prefixes)
    theirs = pair.translate_by_peer(options, pair.prefixes, prefix_bias_beta=strength)
    # CTranslate2 remembers which rank of a step left the prefix, and not which hypothesis: with beams the two may part.
    check(pair, ids, theirs, most_different=0.1 if beam_size > 1 else 0.0)
    assert changed(pair, beam_size, ids)


@BEAM_SIZES
def test_texts_are_suppressed(pair: Pair, beam_size: int) -> None:
    plain, _ = pair.translate(asked(beam_size))
    words = {pair.tokenizer.decode([token], skip_special_tokens=True) for ids in plain for token in ids[:3]}
    texts = [".", *(word for word in sorted(words) if word.isalpha())][:12]
    assert len(texts) > 1
    options = asked(beam_size, suppressed_texts=tuple(texts))
    ids, _ = pair.translate(options)
    sequences = [form for text in texts for form in pair.forms(text)]
    check(pair, ids, pair.translate_by_peer(options, suppress_sequences=sequences))
    assert ids != plain


@BEAM_SIZES
def test_sequences_of_tokens_are_suppressed(pair: Pair, beam_size: int) -> None:
    plain, _ = pair.translate(asked(beam_size))
    unknown = pair.tokenizer.unk_token_id
    found = {ids[:length] for ids, length in zip(plain[:6], (1, 2, 3) * 2, strict=True) if unknown not in ids[:length]}
    sequences = [pair.tokenizer.convert_ids_to_tokens(list(ids)) for ids in sorted(found)]
    assert sequences
    options = asked(beam_size, suppressed_sequences=tuple(map(tuple, sequences)))
    ids, _ = pair.translate(options)
    check(pair, ids, pair.translate_by_peer(options, suppress_sequences=sequences))
    assert ids != plain


@BEAM_SIZES
def test_the_unknown_token_is_suppressed(pair: Pair, beam_size: int, request: pytest.FixtureRequest) -> None:
    options = asked(beam_size, suppress_unknown=True)
    ids, _ = pair.translate(options)
    check(pair, ids, pair.translate_by_peer(options, disable_unk=True))
    unknown_id = pair.tokenizer.unk_token_id
    assert all(unknown_id not in one for one in ids)
    if pair.tokenizer.unk_token_id in {token for one in pair.translate(asked(beam_size))[0] for token in one}:
        assert changed(pair, beam_size, ids)


@BEAM_SIZES
@pytest.mark.parametrize("own", [False, True], ids=["others", "and its own"])
@pytest.mark.parametrize("returned", [False, True])
def test_other_tokens_end_translations(
    pair: Pair, beam_size: int, own: bool, returned: bool, request: pytest.FixtureRequest
) -> None:
    """In the place of the model's own end, which is a token like any other then, or beside it."""
    plain, _ = pair.translate(asked(beam_size))
    counted = [token for ids in plain for token in set(ids[1:4]) if token != pair.tokenizer.unk_token_id]
    ends = pair.tokenizer.convert_ids_to_tokens(sorted(set(counted), key=lambda token: (-counted.count(token), token))[:3])
    assert pair.ours.preparer.end_tokens == ("</s>",)
    named = (*ends, *(pair.ours.preparer.end_tokens if own else ()))
    options = asked(beam_size, end_tokens=named, return_end_token=returned, return_scores=True, length_penalty=0.0)
    ids, translations = pair.translate(options)
    results = pair.results_of_peer(options, end_token=list(named), return_end_token=returned, length_penalty=0.0)
    theirs = [result.hypotheses[0] for result in results]
    # Ours returns only ends that are text.
    check(pair, ids, [pieces[:-1] if own and pieces[-1:] == ["</s>"] else pieces for pieces in theirs])
    assert ids != plain
    has_own = any("</s>" in pieces[:-1] for pieces in theirs)
    # The random model hardly ever ends by itself before it comes to one of these.
    assert not has_own if own else has_own or "random" in request.node.name
    for mine, translation, result in zip(ids, translations, results, strict=True):
        (best,) = translation.hypotheses
        assert best.score == pytest.approx(result.scores[0], abs=SCORE_TOLERANCE)
        assert best.text == pair.tokenizer.decode(mine, skip_special_tokens=True)
        ended_unseen = best.finish_reason is FinishReason.EOS and not (returned and mine and pair.spelled(mine[-1]) in ends)
        assert best.target_tokens == len(mine) + ended_unseen


@BEAM_SIZES
def test_other_tokens_end_no_translation_in_its_prefix_or_too_early(pair: Pair, beam_size: int) -> None:
    pieces = [pair.pieces(prefix, is_target=True) for prefix in pair.prefixes]
    ends = tuple(sorted({one[-1] for one in pieces if one and one[-1] != pair.tokenizer.unk_token})[:8])
    # CTranslate2 takes an end that is too early out before the softmax, ours keeps its share: beams of likely ends would part.
    shortest = 6 if beam_size == 1 else 0
    options = asked(beam_size, end_tokens=ends, min_target_tokens=shortest, return_end_token=True)
    ids, _ = pair.translate(options, pair.prefixes)
    theirs = pair.translate_by_peer(
        options, pair.prefixes, end_token=list(ends), return_end_token=True, min_decoding_length=shortest
    )
    check(pair, ids, theirs)
    assert min(map(len, ids)) > shortest


@BEAM_SIZES
def test_lengths_by_ratio(pair: Pair, beam_size: int) -> None:
    options = asked(beam_size, max_target_ratio=0.5, max_target_tokens=None)
    ids, translations = pair.translate(options)
    for text, mine, translation in zip(pair.sources, ids, translations, strict=True):
        source = [*pair.pieces(text), "</s>"]
        assert translation.source_tokens == len(source)
        (result,) = pair.theirs.translate_batch(
            [source], beam_size=beam_size, min_decoding_length=0, max_decoding_length=len(source) // 2
        )
        assert list(mine) == pair.tokenizer.convert_tokens_to_ids(result.hypotheses[0]), text


def test_a_minimum_by_ratio(pair: Pair) -> None:
    ids, translations = pair.translate(asked(1, min_target_ratio=1.5, max_target_tokens=None))
    for text, mine, translation in zip(pair.sources[:20], ids, translations, strict=False):
        shortest = math.ceil(1.5 * translation.source_tokens)
        (result,) = pair.theirs.translate_batch(
            [[*pair.pieces(text), "</s>"]],
            beam_size=1,
            min_decoding_length=shortest,
            max_decoding_length=2 * translation.source_tokens + 32,
        )
        assert list(mine) == pair.tokenizer.convert_tokens_to_ids(result.hypotheses[0]), text
        assert len(mine) >= shortest


@BEAM_SIZES
def test_sources_are_cut_to_a_length(pair: Pair, beam_size: int) -> None:
    # Those that the model adds are not cut: the last of them is the end of the sentence, for both.
    options = asked(beam_size, max_source_tokens=6)
    ids, _ = pair.translate(options)
    check(pair, ids, pair.translate_by_peer(options, max_input_length=6))
    assert changed(pair, beam_size, ids)


def test_the_translation_of_nothing_is_its_prefix(pair: Pair) -> None:
    prefix = next(prefix for prefix in pair.prefixes if len(prefix.split()) > 1)
    preparer, options = pair.ours.preparer, asked(1, return_scores=True, return_token_scores=True)
    for text in ("", prefix):
        (mine,) = preparer.blank(options, preparer.prefix_ids(text, "target_prefixes[0]", options, 0)).hypotheses
        pieces = pair.pieces(text, is_target=True)
        (its,) = pair.theirs.translate_batch([["</s>"]], [pieces] if pieces else None, return_scores=True)
        assert (mine.text, list(mine.target_pieces), mine.score) == (text, its.hypotheses[0], its.scores[0])
