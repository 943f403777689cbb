"""Checkpoints with the files of published ones: what ``generate`` makes of them when it is told nothing but the number of beams.

Each is made here, small and with random weights, and has the settings of a real one. A request that leaves its options open is to
have the same answers, token by token. Models of several languages are told theirs on both sides, as their makers say.
"""

from __future__ import annotations

import json
import math
import queue
import random
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from export.pipeline import export_bundle
from serving.config import EngineConfig, RequestLimits
from serving.model import ServedModel, load_model
from serving.observer import NullObserver
from serving.request import FinishReason, Hypothesis, Outcome
from serving.request_options import RequestOptions
from tests.peers import test_hugging_face_families as families
from tests.published_models import PUBLISHED, PublishedModel
from tests.support import SAMPLE_LINES, TINY_LINES

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

SOURCES = 200
# Sources that Hugging Face pads and decodes together.
BATCH = 50
# Of a target, where its model does not say.
LONGEST = 30
# Waiting that long for all sentences is a failure.
PATIENCE_S = 300.0


def marian(directory: Path) -> int:
    """Its SentencePiece models and ``vocab.json``, with tokens of languages, of which a model with one has no use."""
    serialized = families.train("unigram")
    model = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    pieces = [model.id_to_piece(i) for i in range(3, model.get_piece_size())]
    tokens = ["</s>", "<unk>", *pieces, ">>es<<", ">>fr<<", "<pad>"]
    for side in ("source", "target"):
        (directory / f"{side}.spm").write_bytes(serialized)
    families.write_json(directory / "vocab.json", {token: i for i, token in enumerate(tokens)})
    return len(tokens)


def mbart(directory: Path) -> int:
    """The older one's SentencePiece model alone."""
    families.fairseq_sentencepiece(directory, "unigram")
    families.write_json(directory / "tokenizer_config.json", {"tokenizer_class": "MBartTokenizer", "src_lang": "en_XX"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return len(tokenizer)


def bart_without_mask(directory: Path) -> int:
    """A tokenizer whose last token, ``<mask>``, the model lacks."""
    size = families.bart(directory)
    vocabulary = json.loads((directory / "vocab.json").read_text())
    last = next(token for token, i in vocabulary.items() if i == size - 1)
    vocabulary[last], vocabulary["<mask>"] = vocabulary["<mask>"], vocabulary[last]
    families.write_json(directory / "vocab.json", vocabulary)
    return size - 1


@dataclass(frozen=True)
class Build:
    """How a published model is made small."""

    tokenizer: Callable[[Path], int]
    prefix: str
    # (source, target) languages of the sources in turn; empty of a model that is told none.
    pairs: tuple[tuple[str, str], ...] = (("", ""),)
    # Of ids as they are published, the token whose id takes their place.
    tokens: Mapping[int, str] = field(default_factory=dict)
    # Whether the user of ``generate`` has to force the target's language.
    forces_language: bool = False
    # What the library did itself when the checkpoint was published, and does no more.
    then: Mapping[str, Any] = field(default_factory=dict)
    # Whether the weights are stored without the head.
    is_headless: bool = False
    # Whether the longest length is not stated, so that both are told one.
    is_endless: bool = False
    # What is added to the logit of the end: so many that some targets end by themselves.
    eagerness: float = 5.0


# What makers of children of such models choose now and then, all of it.
TUNED: Mapping[str, Any] = {
    "bad_words_ids": [[20, 21], [22], [23, 24, 25]],
    "length_penalty": 0.0,
    "max_new_tokens": 30,
    "min_new_tokens": 4,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.3,
    "suppress_tokens": [*range(30, 60)],
}
# Targets that end at more than one token, and what none starts with.
ENDED: Mapping[str, Any] = {"begin_suppress_tokens": [2, 25, 26], "eos_token_id": [2, 21, 40, 61]}
# One of the ends is no bad word, others are suppressed all the same.
SUPPRESSED: Mapping[str, Any] = {**ENDED, "bad_words_ids": [[21]], "suppress_tokens": [40, 61, *range(30, 36)]}
PLAIN = PUBLISHED["nllb-200-distilled-600M"], PUBLISHED["bart-large-cnn"]
MODELS = {
    **PUBLISHED,
    "an NLLB, tuned": PublishedModel(config=PLAIN[0].config, generation={**(PLAIN[0].generation or {}), **TUNED}),
    "a BART, tuned": PublishedModel(
        config=PLAIN[1].config,
        generation={**(PLAIN[1].generation or {}), **TUNED, "early_stopping": True, "min_length": 0},
    ),
    "an NLLB of several ends": PublishedModel(config=PLAIN[0].config, generation={**(PLAIN[0].generation or {}), **ENDED}),
    "a BART of several ends": PublishedModel(
        config=PLAIN[1].config, generation={**(PLAIN[1].generation or {}), **ENDED, "min_length": 12, "forced_eos_token_id": 21}
    ),
    "a BART of several ends, some suppressed": PublishedModel(
        config=PLAIN[1].config, generation={**(PLAIN[1].generation or {}), **SUPPRESSED, "min_length": 12}
    ),
}
M2M100_PAIRS, NLLB_PAIRS, MBART_PAIRS = (("en", "de"), ("de", "fr"), ("zu", "af")), families.NLLB_PAIRS, families.MBART_PAIRS
INTO_ENGLISH = (("de_DE", "en_XX"), ("fr_XX", "en_XX"))
BUILDS = {
    "opus-mt-en-fr": Build(marian, "Marian", (("", "fr"), ("", "es")), {59513: "<pad>"}, eagerness=8.0),
    "opus-mt-en-de, 2021": Build(marian, "Marian", (("", "fr"),), {58100: "<pad>"}, eagerness=8.0),
    "opus-mt-en-ROMANCE, 2020": Build(marian, "Marian", (("", "fr"), ("", "es")), {65000: "<pad>"}, eagerness=8.0),
    "m2m100_418M": Build(families.m2m100, "M2M100", M2M100_PAIRS, forces_language=True),
    "nllb-200-distilled-600M": Build(families.nllb, "M2M100", NLLB_PAIRS, forces_language=True),
    "nllb-200, sources as they were": Build(families.nllb, "M2M100", NLLB_PAIRS, forces_language=True),
    "mbart-large-50-many-to-many-mmt": Build(families.mbart50, "MBart", MBART_PAIRS, forces_language=True),
    "mbart-large-50-many-to-one-mmt": Build(families.mbart50_sentencepiece, "MBart", INTO_ENGLISH, {250004: "en_XX"}),
    "mbart-large-en-ro": Build(mbart, "MBart", (("en_XX", "ro_RO"), ("de_DE", "ro_RO")), {250020: "ro_RO"}, eagerness=9.5),
    "mbart-large-cc25": Build(mbart, "MBart", MBART_PAIRS, forces_language=True, eagerness=9.5),
    "bart-large-cnn": Build(bart_without_mask, "Bart", eagerness=8.0),
    "bart-base": Build(families.bart_json, "Bart", is_headless=True, is_endless=True, eagerness=6.0),
    "distilbart-cnn-12-6, 2020": Build(bart_without_mask, "Bart", then={"forced_bos_token_id": 0}, eagerness=8.0),
    "an NLLB, tuned": Build(families.nllb, "M2M100", NLLB_PAIRS, forces_language=True, eagerness=7.0),
    "a BART, tuned": Build(bart_without_mask, "Bart", eagerness=7.0),
    "an NLLB of several ends": Build(families.nllb, "M2M100", NLLB_PAIRS, forces_language=True),
    "a BART of several ends": Build(bart_without_mask, "Bart", eagerness=5.0),
    "a BART of several ends, some suppressed": Build(bart_without_mask, "Bart", eagerness=5.0),
    "pegasus-xsum": Build(families.pegasus, "Pegasus", eagerness=9.0),
    "pegasus-cnn_dailymail": Build(families.pegasus, "Pegasus", eagerness=8.0),
}
LENGTHS = ("max_length", "min_length")
SIZES: Mapping[str, int] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
}


def small(published: Mapping[str, Any], ids: Mapping[int, int], vocab_size: int) -> dict[str, Any]:
    """The settings of a published file for a small model: shorter, and with its ids."""

    def replaced(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(name, one) for one in value]
        if name in LENGTHS and value is not None:
            # No longer than what a request gets at most of its own accord.
            return min(48, value // 4)
        return ids.get(value, value) if type(value) is int else value

    sizes = {"vocab_size": vocab_size, "decoder_vocab_size": vocab_size}
    return {name: sizes[name] if name in sizes else replaced(name, value) for name, value in published.items()}


def random_model(build: Build, config: Mapping[str, Any]) -> Any:
    """A model of random weights, biases and norms too, that decodes neither padding nor a start token, and does end.

    Two coordinates of the decoder's last states are constants, by which padding and start are out, and ends are likely.
    """
    prefix = build.prefix
    architecture = {name: value for name, value in config.items() if name not in ("max_length", "num_beams", "model_type")}
    made = getattr(transformers, f"{prefix}Config")(**architecture)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{prefix}{'MTModel' if prefix == 'Marian' else 'ForConditionalGeneration'}")(made).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                elif "embed_positions" not in name:
                    parameter.normal_(std=0.1 if "shared" in name or "embed_tokens" in name else 0.5)
            is_post = prefix in ("Bart", "Marian")
            norm = model.get_submodule(f"model.decoder.{'layers.0.final_layer_norm' if is_post else 'layer_norm'}")
            # Clear decisions of small embeddings: large ones would make a target say its last token for ever.
            norm.weight.mul_(5)
            norm.weight[:2], norm.bias[0], norm.bias[1] = 0, 50, build.eagerness
            table = model.get_input_embeddings().weight
            table[:, :2] = 0
            start = config.get("decoder_start_token_id", config["bos_token_id"])
            for token_id in {config["pad_token_id"], start} - {config["eos_token_id"]}:
                table[token_id, 0] = -1
            table[config["eos_token_id"], 1] = 1
    return model


def write_checkpoint(name: str, directory: Path) -> None:
    """The directory of a published model, made small."""
    published, build = MODELS[name], BUILDS[name]
    size = build.tokenizer(directory)
    settings = json.loads(path.read_text()) if (path := directory / "tokenizer_config.json").exists() else {}
    if build.tokenizer is marian:
        vocabulary = json.loads((directory / "vocab.json").read_text())
    else:
        vocabulary = {token: load_tokenizer(directory).convert_tokens_to_ids(token) for token in build.tokens.values()}
    ids = {theirs: vocabulary[token] for theirs, token in build.tokens.items()}
    config = {"vocab_size": size, **small(published.config, ids, size), **SIZES}
    model = random_model(build, config)
    model.save_pretrained(directory)
    families.write_json(directory / "config.json", config)
    if published.generation is None:
        (directory / "generation_config.json").unlink()
    else:
        families.write_json(directory / "generation_config.json", small(published.generation, ids, size))
    families.write_json(directory / "tokenizer_config.json", settings | dict(published.tokenizer))
    if build.is_headless:
        stored = load_file(directory / "model.safetensors")
        body = {key.removeprefix("model."): tensor for key, tensor in stored.items() if key.startswith("model.")}
        save_file(body, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "samples.txt").write_text("\n".join(SAMPLE_LINES[:2]))


def load_tokenizer(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(directory)


@dataclass
class Peers:
    """A bundle that is served, and what Hugging Face reads."""

    name: str
    served: ServedModel
    model: Any
    tokenizer: Any

    @property
    def build(self) -> Build:
        return BUILDS[self.name]


@pytest.fixture(scope="module", params=MODELS)
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("published")
    directory = work / "checkpoint"
    directory.mkdir()
    write_checkpoint(request.param, directory)
    export_bundle(directory, work / "bundle", show_progress=False)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    served = load_model(work / "bundle", EngineConfig(threads=1), RequestLimits(), NullObserver())
    tokenizer = None if request.param.startswith("opus") else load_tokenizer(directory)
    yield Peers(request.param, served, model, tokenizer)
    served.engine.close()


def texts() -> list[str]:
    """Sentences of random words, short and long."""
    rng, words = random.Random(7), " ".join(TINY_LINES).split()
    return [" ".join(rng.choices(words, k=rng.randint(8, 16))) for _ in range(SOURCES)]


def answers(
    peers: Peers, number: int, pair: tuple[str, str], options: RequestOptions
) -> list[tuple[tuple[int, ...], Hypothesis]]:
    """Each source's ids and its best hypothesis, of the texts that are of this pair."""
    preparer, engine = peers.served.preparer, peers.served.engine
    direction = preparer.direction(*pair)
    outcomes: queue.Queue[tuple[int, Outcome]] = queue.Queue()
    sources = [preparer.source_ids(text, "texts", direction) for text in texts()[number :: len(peers.build.pairs)]]
    engine.submit(
        [
            preparer.sequence(
                source,
                options,
                direction=direction,
                arrived_at_s=time.monotonic(),
                expires_at_s=math.inf,
                on_outcome=lambda outcome, i=i: outcomes.put((i, outcome)),  # type: ignore[misc]  # a default of a lambda
            )
            for i, source in enumerate(sources)
        ]
    )
    found = dict(outcomes.get(timeout=PATIENCE_S) for _ in sources)
    return [(source, found[i].hypotheses[0]) for i, source in enumerate(sources)]


def generate(peers: Peers, sources: list[tuple[int, ...]], pair: tuple[str, str], num_beams: int) -> list[list[int]]:
    """What Hugging Face makes of each source, with the start token."""
    told = peers.served.preparer.language_tokens
    chosen = dict(peers.build.then)
    if peers.build.forces_language:
        assert told is not None
        chosen["forced_bos_token_id"] = told.tokens[pair[1]]
    if peers.build.is_endless:
        chosen["max_new_tokens"] = LONGEST + len(peers.served.preparer.target_prefix)
    pad_id, rows = peers.model.config.pad_token_id, []
    for start in range(0, len(sources), BATCH):
        batch = sources[start : start + BATCH]
        lengths = torch.tensor([len(source) for source in batch])
        longest = int(lengths.max())
        rows += peers.model.generate(
            torch.tensor([[*source, *[pad_id] * (longest - len(source))] for source in batch]),
            attention_mask=(torch.arange(longest) < lengths[:, None]).long(),
            num_beams=num_beams,
            **chosen,
        ).tolist()
    return rows


@pytest.mark.parametrize("num_beams", [1, 4])
def test_a_request_that_leaves_it_open_gets_what_generate_makes(peers: Peers, num_beams: int) -> None:
    preparer, stated = peers.served.preparer, peers.model.generation_config.eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    options = RequestOptions(beam_size=num_beams, max_target_tokens=LONGEST if peers.build.is_endless else None)
    reasons, all_ids = [], set()
    for number, pair in enumerate(peers.build.pairs):
        ours = answers(peers, number, pair, options)
        hidden = len(preparer.direction(*pair).before_target)
        theirs = generate(peers, [source for source, _ in ours], pair, num_beams)
        for (_, mine), row in zip(ours, theirs, strict=True):
            # The first token may be the one that ends targets too.
            its = row[1 + hidden :]
            assert list(mine.target_ids) == its[: next((i for i, token_id in enumerate(its) if token_id in ends), len(its))]
            all_ids.add(mine.target_ids)
            reasons.append(mine.finish_reason)
    lengths = [len(ids) for ids in all_ids]
    num_cut = reasons.count(FinishReason.LENGTH)
    print(f"{peers.name}: {len(all_ids)} different, of {min(lengths)} to {max(lengths)} tokens, {num_cut} cut")
    # Enough different ones, and of lengths that are the model's own, to say something.
    assert len(all_ids) > SOURCES / 4
    assert reasons.count(FinishReason.EOS) >= SOURCES / 10


def test_sources_are_the_same(peers: Peers) -> None:
    if peers.tokenizer is None:
        pytest.skip("Marian's sources are compared elsewhere")
    for pair in peers.build.pairs:
        if pair[0]:
            peers.tokenizer.src_lang = pair[0]
        direction = peers.served.preparer.direction(*pair)
        for text in texts()[:50]:
            assert list(peers.served.preparer.source_ids(text, "text", direction)) == peers.tokenizer(text).input_ids
