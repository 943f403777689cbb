"""CTranslate2's own model directories as CTranslate2 computes them and as we do: log-probabilities and translations.

Models are random, and written by CTranslate2's converters: from Hugging Face's Marian, M2M100 and BART, and, as the converters of
OpenNMT do, from a ``TransformerSpec`` with the weights put in directly. Whatever the type that weights are stored in, CTranslate2
computes in float32 from what they stand for, as we do.
"""

from __future__ import annotations

import gzip
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import build_model
from serving.manifest import Precision
from serving.request import DecodingOptions
from serving.tokenizers import load_tokenizer
from tests.peers.ctranslate2_peer import Answer, Comparison
from tests.peers.subject import Subject
from tests.support import tiny_sentencepiece
from tests.vocabularies import marian_vocabulary

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

SHARED = Path(__file__).parents[3] / "shared"
CAPTIONS = SHARED / "data" / "multi30k" / "test_2016_flickr.en.gz"
TRAINED = SHARED / "models" / "multi30k-base-en-de"
LOG_PROB_TOLERANCE = 1e-3
# As in test_ctranslate2.py.
LEAST_INT8_AGREEMENT = 0.75
NUM_SOURCES = 200
MAX_TARGET_TOKENS = 24
# Of random models; that theirs and ours are the same says little if all are one.
LEAST_DIFFERENT_TARGETS = 10
STORED = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float16", "int8_bfloat16")
EMBEDDING_STD, LAST_NORM = 0.1, 6.0
# An output weight of the end-of-sentence token that makes it likely enough for targets to end, at any length.
END_LOGIT = 3.0
# That of a token that never comes.
UNLIKELY_LOGIT = -30.0
SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.6,
}

# Writes a directory of CTranslate2 with weights stored in a type.
Convert = Callable[[Path, str], None]


@dataclass(frozen=True)
class Imported:
    """A model of CTranslate2, and what we make of it."""

    subject: Subject
    directory: Path
    # Of a model of many languages.
    source_language: str | None = None
    target_language: str | None = None

    @property
    def source_pieces(self) -> list[str]:
        """CTranslate2's tokens of the source by our ids; one that is only ours is spelled as none of theirs."""
        return self._pieces("source_vocabulary.json", self.subject.checkpoint.config.source_vocab_size)

    @property
    def target_pieces(self) -> list[str]:
        """Likewise, of the target."""
        return self._pieces("target_vocabulary.json", self.subject.checkpoint.config.target_vocab_size)

    def _pieces(self, name: str, size: int) -> list[str]:
        files = self.subject.checkpoint.tokenizer_files
        contents = files.get(name, files.get("vocabulary.json"))
        assert isinstance(contents, bytes)
        named = {i: token for token, i in json.loads(contents).items()}
        return [named.get(i, only_ours(i)) for i in range(size)]

    def sources(self, number: int = NUM_SOURCES) -> list[tuple[int, ...]]:
        """Random sources, with what every source starts and ends with."""
        checkpoint = self.subject.checkpoint
        config = checkpoint.config
        told = checkpoint.language_tokens
        first = checkpoint.source_prefix if told is None else (told.tokens[str(self.source_language)],)
        unsaid = {config.pad_id, config.eos_id, config.decoder_start_id, *(told.tokens.values() if told else ())}
        allowed = [i for i in range(config.source_vocab_size) if i not in unsaid]
        rng = np.random.default_rng(1)
        end = (config.eos_id,) if checkpoint.source_ends_with_eos else ()
        return [(*first, *rng.choice(allowed, rng.integers(1, 20)).tolist(), *end) for _ in range(number)]

    @property
    def target_prefix(self) -> tuple[int, ...]:
        """What every target starts with, after the start token."""
        told = self.subject.checkpoint.language_tokens
        return () if told is None else (told.tokens[str(self.target_language)],)

    def spelled(self, source: tuple[int, ...]) -> list[str]:
        """The tokens of a source, without what CTranslate2 adds itself."""
        settings = json.loads((self.directory / "config.json").read_text())
        pieces = self.source_pieces
        return [pieces[i] for i in source[: -1 if settings["add_source_eos"] else None]]


def only_ours(token_id: int) -> str:
    return f"<{token_id}>"


def liven(model: Any, last_norm: Any, eos_id: int, pad_id: int, end_logit: float = END_LOGIT) -> None:
    """Make targets of a random model of Hugging Face neither all alike nor endless.

    Where embeddings are small, a token is not the next one's most likely; the last norm makes up for it. Its first value is made
    constant, and thereby a bias of the output.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight.copy_(EMBEDDING_STD * torch.randn_like(embedding.weight))
        last_norm.weight *= LAST_NORM
        last_norm.weight[0], last_norm.bias[0] = 0, 1 / EMBEDDING_STD
        output = model.get_output_embeddings().weight
        output[eos_id, 0] = end_logit * EMBEDDING_STD
        # CTranslate2 may decode it, we do not.
        output[pad_id, 0] = UNLIKELY_LOGIT * EMBEDDING_STD


def convert(directory: Path, work: Path, stored: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
        ctranslate2.converters.TransformersConverter(str(directory)).convert(str(work), quantization=stored)


def marian(work: Path) -> Convert:
    vocabulary = marian_vocabulary(tiny_sentencepiece())
    pad_id = vocabulary["<pad>"]
    config = transformers.MarianConfig(
        **SIZES,
        vocab_size=len(vocabulary),
        activation_function="swish",
        pad_token_id=pad_id,
        decoder_start_token_id=pad_id,
        eos_token_id=0,
        forced_eos_token_id=None,
        scale_embedding=True,
    )
    model = transformers.MarianMTModel(config)
    liven(model, model.model.decoder.layers[-1].final_layer_norm, 0, pad_id)
    model.final_logits_bias.normal_()
    model.save_pretrained(work)
    for side in ("source", "target"):
        (work / f"{side}.spm").write_bytes(tiny_sentencepiece())
    (work / "vocab.json").write_text(json.dumps(vocabulary))
    (work / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    return lambda directory, stored: convert(work, directory, stored)


def m2m100(work: Path) -> Convert:
    pieces = [piece for piece in marian_vocabulary(tiny_sentencepiece()) if not piece.startswith("<")]
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *pieces])}
    (work / "vocab.json").write_text(json.dumps(vocabulary))
    (work / "sentencepiece.bpe.model").write_bytes(tiny_sentencepiece())
    languages = [f"__{code}__" for code in ("de", "en", "fr", "ast")]
    # The published models have as many words without a meaning, and list their languages.
    settings = {"tokenizer_class": "M2M100Tokenizer", "num_madeup_words": 8, "additional_special_tokens": languages}
    (work / "tokenizer_config.json").write_text(json.dumps(settings))
    size = len(transformers.M2M100Tokenizer.from_pretrained(work)) + 8
    config = transformers.M2M100Config(
        **SIZES,
        vocab_size=size,
        activation_function="relu",
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        scale_embedding=True,
    )
    model = transformers.M2M100ForConditionalGeneration(config)
    # CTranslate2's beams, unlike its greedy search, never end right after a prefix: with ends, other hypotheses would compete.
    liven(model, model.model.decoder.layer_norm, 2, 1, UNLIKELY_LOGIT)
    model.save_pretrained(work)
    return lambda directory, stored: convert(work, directory, stored)


def bart(work: Path) -> Convert:
    letters = [chr(letter) for letter in range(ord("a"), ord("z") + 1)]
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "\u0120", "<mask>"])}
    (work / "vocab.json").write_text(json.dumps(vocabulary))
    (work / "merges.txt").write_text("#version: 0.2\n")
    (work / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BartTokenizer"}))
    config = transformers.BartConfig(
        **SIZES,
        vocab_size=len(vocabulary),
        activation_function="gelu",
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        scale_embedding=False,
        normalize_before=False,
    )
    model = transformers.BartForConditionalGeneration(config)
    liven(model, model.model.decoder.layers[-1].final_layer_norm, 2, 1)
    model.save_pretrained(work)
    return lambda directory, stored: convert(work, directory, stored)


def opennmt(
    *,
    shared: bool,
    eos_in_source: int = 3,
    pre_norm: bool = True,
    activation: str = "RELU",
    positions: bool = True,
    zero_start: bool = False,
    ends: bool = True,
) -> Callable[[Path], Convert]:
    """A model as OpenNMT's converters make them, vocabularies of several hundred tokens, sources ended by CTranslate2 or not."""

    def make(work: Path) -> Convert:
        def write(directory: Path, stored: str) -> None:
            special = ["<unk>", "<blank>", "<s>", "</s>"]
            target = [*special, *(f"t{i}" for i in range(300))]
            source = [*special[:3], *(f"s{i}" for i in range(250))]
            source.insert(eos_in_source, "</s>")
            if shared:
                source = target
            specs = ctranslate2.specs
            spec = specs.TransformerSpec.from_config((2, 3), 4, pre_norm=pre_norm, activation=specs.Activation[activation])
            fill(spec, len(source), len(target), positions=positions)
            if shared:
                spec.encoder.embeddings[0].weight = spec.decoder.embeddings.weight
            spec.decoder.start_from_zero_embedding = zero_start
            spec.register_source_vocabulary(source)
            spec.register_target_vocabulary(target)
            spec.config.add_source_eos = ends
            spec.validate()
            spec.optimize(quantization=stored)
            directory.mkdir()
            spec.save(str(directory))

        return write

    return make


def fill(spec: Any, source_size: int, target_size: int, *, positions: bool, d_model: int = 32) -> None:
    """Random weights for a ``TransformerSpec``; markers are unlikely, the end of a sentence likely enough."""
    rng = np.random.default_rng(7)

    # Wider sums are of more, and scores that are too large are rounded too coarsely to be compared.
    def normal(*shape: int, std: float = 0.5 * (32 / d_model) ** 0.5) -> Any:
        return rng.normal(scale=std, size=shape).astype(np.float32)

    def linear(linear_spec: Any, rows: int, columns: int = d_model) -> None:
        linear_spec.weight, linear_spec.bias = normal(rows, columns), normal(rows, std=0.1)

    def norm(norm_spec: Any) -> None:
        norm_spec.gamma, norm_spec.beta = 1 + normal(d_model, std=0.2), normal(d_model, std=0.2)

    spec.encoder.embeddings[0].weight = normal(source_size, d_model, std=EMBEDDING_STD)
    spec.decoder.embeddings.weight = normal(target_size, d_model, std=EMBEDDING_STD)
    for side, d_ff in ((spec.encoder, 40), (spec.decoder, 48)):
        if positions:
            side.position_encodings.encodings = normal(100, d_model)
        if hasattr(side, "layer_norm"):
            norm(side.layer_norm)
        for layer in side.layer:
            linear(layer.self_attention.linear[0], 3 * d_model)
            linear(layer.self_attention.linear[1], d_model)
            norm(layer.self_attention.layer_norm)
            if side is spec.decoder:
                for rows, linear_spec in zip((1, 2, 1), layer.attention.linear, strict=True):
                    linear(linear_spec, rows * d_model)
                norm(layer.attention.layer_norm)
            linear(layer.ffn.linear_0, d_ff)
            linear(layer.ffn.linear_1, d_model, d_ff)
            norm(layer.ffn.layer_norm)
    linear(spec.decoder.projection, target_size)
    spec.decoder.projection.weight *= 2
    spec.decoder.projection.bias[:4] = (UNLIKELY_LOGIT, UNLIKELY_LOGIT, UNLIKELY_LOGIT, END_LOGIT)


# A model in its own format -> how CTranslate2's form of it is written.
MODELS: dict[str, Callable[[Path], Convert]] = {
    "Marian": marian,
    "M2M100": m2m100,
    "BART": bart,
    "OpenNMT": opennmt(shared=True),
    "OpenNMT, sources without an end": opennmt(shared=True, ends=False),
    "OpenNMT, post-norm, computed positions": opennmt(shared=True, pre_norm=False, positions=False, activation="SWISH"),
    "two vocabularies, gelu by tanh": opennmt(shared=False, activation="GELUTanh"),
    "two vocabularies, ends apart, gelu by sigmoid": opennmt(shared=False, eos_in_source=100, activation="GELUSigmoid"),
    "two vocabularies, ends apart, from zero": opennmt(shared=False, eos_in_source=100, zero_start=True),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Convert]:
    work = tmp_path_factory.mktemp("origin")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return request.param, MODELS[request.param](work)


def imported(model: tuple[str, Convert], work: Path, stored: str) -> Imported:
    name, write = model
    directory = work / f"{name}-{stored}".replace(", ", "-").replace(" ", "-")
    write(directory, stored)
    # Few, so that the certificate takes no long wanderings of ids that mean nothing.
    tokens = json.loads(next(directory.glob("*_vocabulary.json")).read_text())
    (directory / "samples.txt").write_text("".join(f"{' '.join(tokens[i : i + 5])}\n" for i in (10, 20, 30)))
    subject = Subject(directory, work)
    return Imported(subject, directory, *(("en", "de") if name == "M2M100" else ()))


@pytest.fixture(scope="module")
def exact(model: tuple[str, Convert], tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return imported(model, tmp_path_factory.mktemp("exact"), "float32")


@pytest.mark.parametrize("stored", STORED)
def test_log_probabilities_are_the_same(model: tuple[str, Convert], tmp_path: Path, stored: str) -> None:
    case = imported(model, tmp_path, stored)
    checkpoint, pieces = case.subject.checkpoint, case.target_pieces
    config = checkpoint.config
    translator = ctranslate2.Translator(str(case.directory), compute_type="float32")
    rng = np.random.default_rng(2)
    # Tokens that CTranslate2 has too.
    known = [i for i, piece in enumerate(pieces) if piece != only_ours(i) and i != config.eos_id]
    module = build_model(checkpoint)
    sources = case.sources(20)
    targets = [[*case.target_prefix, *rng.choice(known, rng.integers(1, 15)).tolist()] for _ in sources]
    found = translator.score_batch(
        [case.spelled(source) for source in sources], [[pieces[i] for i in target] for target in targets]
    )
    # The token that only we have, if there is one.
    added = [i for i in range(config.target_vocab_size) if pieces[i] == only_ours(i)]
    apart = 0.0
    for source, target, result in zip(sources, targets, found, strict=True):
        with torch.no_grad():
            logits = module(
                torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[config.decoder_start_id, *target]])
            )[0]
        logits[:, added] = -math.inf
        labels = torch.tensor([*target, config.eos_id])
        mine = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        assert len(result.log_probs) == len(mine)
        apart = max(apart, float((mine - torch.tensor(result.log_probs)).abs().max()))
    print(f"{model[0]}, {stored}: log-probabilities are up to {apart:.1e} apart")
    assert apart <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize(("beam_size", "length_penalty"), [(1, 0.0), (4, 0.0), (4, 1.0)])
def test_translations_are_the_same(exact: Imported, beam_size: int, length_penalty: float) -> None:
    comparison = compare(exact, beam_size, length_penalty)
    assert len({mine.target_ids for mine in comparison.ours}) >= LEAST_DIFFERENT_TARGETS
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """A trained model, its SentencePiece models put beside CTranslate2's form of it."""
    if not TRAINED.is_dir() or not CAPTIONS.is_file():
        pytest.skip("not there: shared/models/multi30k-base-en-de and shared/data/multi30k beside the repository")
    work = tmp_path_factory.mktemp("trained")
    directory = work / "model"
    convert(TRAINED, directory, "int8")
    for name in ("source.spm", "target.spm"):
        (directory / name).write_bytes((TRAINED / name).read_bytes())
    (directory / "samples.txt").write_text("\n".join(captions()[NUM_SOURCES : NUM_SOURCES + 24]))
    return Imported(Subject(directory, work), directory)


def captions() -> list[str]:
    return gzip.decompress(CAPTIONS.read_bytes()).decode().splitlines()


@pytest.mark.parametrize(("beam_size", "length_penalty"), [(1, 0.0), (4, 1.0)])
def test_translations_of_a_trained_model_are_the_same(trained: Imported, beam_size: int, length_penalty: float) -> None:
    comparison = compare(trained, beam_size, length_penalty, sources=encoded(trained))
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE


@pytest.mark.parametrize(("beam_size", "length_penalty"), [(1, 0.0), (4, 1.0)])
def test_int8_translations_of_a_trained_model_are_mostly_the_same(
    trained: Imported, beam_size: int, length_penalty: float
) -> None:
    comparison = compare(trained, beam_size, length_penalty, "int8", encoded(trained))
    # Scales of activations are constants here, and each row's own there: either changes some answers, in its own places.
    assert comparison.agreement >= LEAST_INT8_AGREEMENT


def encoded(case: Imported) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(case.subject.bundle("fp32"))
    return [(*tokenizer.encode(line), case.subject.checkpoint.config.eos_id) for line in captions()[:NUM_SOURCES]]


def compare(
    case: Imported,
    beam_size: int,
    length_penalty: float,
    precision: Precision = "fp32",
    sources: list[tuple[int, ...]] | None = None,
) -> Comparison:
    options = DecodingOptions(
        beam_size=beam_size,
        length_penalty=length_penalty,
        max_target_tokens=MAX_TARGET_TOKENS if sources is None else 60,
        target_prefix=case.target_prefix,
        early_stopping=True,
    )
    sources = case.sources() if sources is None else sources
    ours = [hypotheses[0] for hypotheses in case.subject.decode(sources, options, precision)]
    comparison = Comparison(ours, theirs(case, sources, options, precision), options)
    comparison.tell(f"{case.directory.name}, {precision}")
    return comparison


def theirs(case: Imported, sources: list[tuple[int, ...]], options: DecodingOptions, precision: Precision) -> list[Answer]:
    """CTranslate2's best hypotheses, without what every target starts with."""
    ids = {piece: i for i, piece in enumerate(case.target_pieces)}
    prefix = [case.target_pieces[i] for i in options.target_prefix]
    translator = ctranslate2.Translator(str(case.directory), compute_type="float32" if precision == "fp32" else "int8")
    results = translator.translate_batch(
        [case.spelled(source) for source in sources],
        [prefix] * len(sources) if prefix else None,
        beam_size=options.beam_size,
        length_penalty=options.length_penalty,
        min_decoding_length=options.min_target_tokens,
        max_decoding_length=options.max_target_tokens,
        return_scores=True,
        max_batch_size=24,
    )
    answers = []
    for result in results:
        target = tuple(ids[piece] for piece in result.hypotheses[0])
        target_tokens = min(len(target) + 1, options.max_target_tokens)
        answers.append(Answer(target, target_tokens, result.scores[0] * target_tokens**options.length_penalty))
    return answers
