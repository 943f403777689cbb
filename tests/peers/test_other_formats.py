"""Models in the formats of other projects: our module and engine against what these projects compute.

Neither fairseq nor OpenNMT-py is installed here, and Marian need not be (see ``test_marian_decoder.py``); random models are
written in their formats. Logits are compared with the forward passes of ``tests/origins.py``, translations with CTranslate2,
whose own converters read the same files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoint import build_model
from serving.request import DecodingOptions
from tests import origins
from tests.peers.ctranslate2_peer import Comparison, Peer
from tests.peers.subject import Subject
from tests.support import ENGLISH_LINES, GERMAN_LINES, tiny_sentencepiece, train_sentencepiece
from tests.tool_classes import ToolClasses
from tests.vocabularies import marian_vocabulary

ctranslate2: Any = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

LOGIT_TOLERANCE = 1e-3
LOG_PROB_TOLERANCE = 1e-3
SCORE_TOLERANCE = 1e-5
NUM_SOURCES = 200
MAX_TARGET_TOKENS = 30


class TwoSidedPeer(Peer):
    """A converted model whose source vocabulary may be another than its target vocabulary."""

    def __init__(self, directory: Path, source_pieces: list[str], target_pieces: list[str]) -> None:
        super().__init__(directory, target_pieces, "fp32")
        self._source_pieces = source_pieces

    def _spelled(self, ids: tuple[int, ...]) -> list[str]:
        return [self._source_pieces[i] for i in ids]


Logits = Callable[[list[int], list[int]], origins.Array]


@dataclass(frozen=True)
class Origin:
    """A model in its own format."""

    subject: Subject
    # What it computes: source ids, target prefix -> logits after each token of the prefix, and before the first.
    logits: Logits
    peer: Peer
    target_pieces: list[str]
    # Whether sources end in the end-of-sentence token, which CTranslate2 then puts there itself.
    sources_end: bool

    def sources(self) -> list[tuple[int, ...]]:
        """Random sources, with the end-of-sentence token where the origin has one."""
        config = self.subject.checkpoint.config
        rng = np.random.default_rng(1)
        allowed = [i for i in range(config.source_vocab_size) if i not in {config.eos_id, *config.never_decoded}]
        end = [config.eos_id] if self.sources_end else []
        return [(*rng.choice(allowed, rng.integers(1, 20)).tolist(), *end) for _ in range(NUM_SOURCES)]


MARIAN: dict[str, dict[str, Any]] = {
    "base": {},
    "gelu and a norm after the embedding": {"transformer-ffn-activation": "gelu", "transformer-postprocess-emb": "nd"},
    "pre-norm, relu": {
        "transformer-preprocess": "n",
        "transformer-postprocess": "da",
        "transformer-postprocess-top": "n",
        "transformer-ffn-activation": "relu",
    },
    "two vocabularies": {"tied-embeddings-all": False, "tied-embeddings": True},
    "nothing tied": {"tied-embeddings-all": False},
    "sides tied, trained positions": {
        "tied-embeddings-all": False,
        "tied-embeddings-src": True,
        "transformer-train-position-embeddings": True,
    },
}


def marian(name: str, work: Path) -> Origin:
    directory = work / "marian"
    directory.mkdir()
    settings = {**origins.MARIAN_SETTINGS, **MARIAN[name]}
    one = marian_vocabulary(tiny_sentencepiece())
    other = marian_vocabulary(train_sentencepiece(GERMAN_LINES, vocab_size=50), seed=1)
    shared = settings["tied-embeddings-all"] or settings["tied-embeddings-src"]
    vocabularies = {"vocab.en.yml": one, "vocab.de.yml": one if shared else other}
    settings["dim-vocabs"] = [len(ids) for ids in vocabularies.values()]
    arrays = origins.marian_arrays(settings, seed=3)
    origins.write_marian_npz(directory / "model.npz", settings, arrays)
    for file_name, ids in vocabularies.items():
        origins.write_marian_vocabulary(directory / file_name, ids)
    (directory / "decoder.yml").write_text("relative-paths: true\nmodels: [model.npz]\nvocabs: [vocab.en.yml, vocab.de.yml]\n")
    (directory / "source.spm").write_bytes(tiny_sentencepiece())
    (directory / "target.spm").write_bytes(tiny_sentencepiece())
    (directory / "samples.txt").write_text("\n".join(ENGLISH_LINES[:4]))
    # The converter takes a table of positions from the file where there is one, and otherwise computes another than Marian's.
    its = dict(arrays)
    d = settings["dim-emb"]
    if "Wpos" in its:
        # Embeddings are not scaled beside trained positions; CTranslate2 scales them all the same.
        its["Wemb"] = its["Wemb"] / np.float32(np.sqrt(d))
    else:
        its["Wpos"] = origins.marian_positions(512, d).astype(np.float32)
    converted = work / "converted"
    paths = [str(directory / file_name) for file_name in vocabularies]
    model = origins.write_marian_npz(work / "with-positions.npz", settings, its)
    ctranslate2.converters.MarianConverter(str(model), paths).convert(str(converted))
    source_pieces, target_pieces = (list(ids) for ids in vocabularies.values())
    return Origin(
        Subject(directory, work),
        lambda source, prefix: origins.marian_logits(settings, arrays, source, prefix),
        TwoSidedPeer(converted, source_pieces, target_pieces),
        target_pieces,
        sources_end=True,
    )


FAIRSEQ: dict[str, dict[str, Any]] = {
    "base": {},
    "one vocabulary, gelu": {"share_all_embeddings": True, "activation_fn": "gelu"},
    "gelu by tanh": {"activation_fn": "gelu_accurate"},
    "pre-norm, a norm after the embedding, swish": {
        "encoder_normalize_before": True,
        "decoder_normalize_before": True,
        "layernorm_embedding": True,
        "activation_fn": "swish",
        # A random one whose start is its end, and what goes in comes out, would end at once.
        "share_decoder_input_output_embed": False,
    },
    "learned positions, not scaled, nothing tied": {
        "encoder_learned_pos": True,
        "decoder_learned_pos": True,
        "no_scale_embedding": True,
        "share_decoder_input_output_embed": False,
    },
}


class Branch(SimpleNamespace):
    """A module, as far as CTranslate2's converter looks at one: its tensors and modules by their names."""

    bias = layer_norm = layernorm_embedding = project_in_dim = project_out_dim = None

    @classmethod
    def grow(cls, arrays: origins.Arrays) -> Branch:
        root = cls()
        for name, array in arrays.items():
            *path, leaf = name.split(".")
            branch = root
            for part in path:
                if getattr(branch, part, None) is None:
                    setattr(branch, part, cls())
                branch = getattr(branch, part)
            setattr(branch, leaf, torch.from_numpy(array))
        return root


def fairseq(name: str, work: Path) -> Origin:
    directory = work / "fairseq"
    directory.mkdir()
    settings = {**origins.FAIRSEQ_SETTINGS, **FAIRSEQ[name]}
    source_model = tiny_sentencepiece()
    target_model = source_model if settings["share_all_embeddings"] else train_sentencepiece(GERMAN_LINES, vocab_size=50)
    pieces = {"en": fairseq_pieces(source_model, seed=0), "de": fairseq_pieces(target_model, seed=0)}
    arrays = origins.fairseq_arrays(settings, (len(pieces["en"]), len(pieces["de"])), seed=7)
    state = {key: torch.from_numpy(array) for key, array in arrays.items()}
    # As versions since 0.10 store it; older ones have the settings under args.
    if settings["share_all_embeddings"]:
        document = {"args": argparse.Namespace(**settings), "model": state}
    else:
        task = {"_name": "translation", "source_lang": "en", "target_lang": "de"}
        document = {"args": None, "cfg": {"model": argparse.Namespace(**settings), "task": task}, "model": state}
    torch.save(document, directory / "checkpoint_best.pt")
    for language, tokens in pieces.items():
        origins.write_fairseq_dictionary(directory / f"dict.{language}.txt", tokens[4:])
    (directory / "source.spm").write_bytes(source_model)
    (directory / "target.spm").write_bytes(target_model)
    (directory / "samples.txt").write_text("\n".join(ENGLISH_LINES[:4]))
    converted = work / "converted"
    convert_fairseq(settings, arrays, pieces, converted)
    return Origin(
        Subject(directory, work),
        lambda source, prefix: origins.fairseq_logits(settings, arrays, source, prefix),
        TwoSidedPeer(converted, pieces["en"], pieces["de"]),
        pieces["de"],
        sources_end=True,
    )


def fairseq_pieces(serialized: bytes, *, seed: int) -> list[str]:
    """All tokens of a dictionary, those that fairseq puts first and those that pad it to a multiple of 8 among them."""
    ids = marian_vocabulary(serialized, seed=seed)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(piece for piece in ids if piece not in ("</s>", "<unk>", "<pad>"))]
    return [*tokens, *(f"madeupword{i:04d}" for i in range(-len(tokens) % 8))]


def convert_fairseq(settings: dict[str, Any], arrays: origins.Arrays, pieces: dict[str, list[str]], converted: Path) -> None:
    """What CTranslate2's converter does with a model that fairseq has built; here a tree of tensors stands for that."""
    converter = ctranslate2.converters.fairseq
    activations = {"relu": "RELU", "gelu": "GELU", "gelu_accurate": "GELUTanh", "swish": "SWISH"}
    spec = ctranslate2.specs.TransformerSpec.from_config(
        (settings["encoder_layers"], settings["decoder_layers"]),
        settings["encoder_attention_heads"],
        pre_norm=settings["encoder_normalize_before"],
        activation=ctranslate2.specs.Activation[activations[settings["activation_fn"]]],
        layernorm_embedding=settings["layernorm_embedding"],
    )
    model = Branch.grow(arrays)
    for module, size in ((model.encoder, settings["encoder_layers"]), (model.decoder, settings["decoder_layers"])):
        module.layers = [getattr(module.layers, str(i)) for i in range(size)]
        module.embed_scale = not settings["no_scale_embedding"]
        d = settings["encoder_embed_dim"]
        # From the first row, that of position 0, on.
        computed = np.concatenate([np.zeros((2, d)), origins.fairseq_positions(64, d)]).astype(np.float32)
        learned = getattr(module.embed_positions, "weight", None)
        module.embed_positions = Branch(weights=torch.from_numpy(computed) if learned is None else learned, padding_idx=1)
    converter.set_transformer_encoder(spec.encoder, model.encoder)
    converter.set_transformer_decoder(spec.decoder, model.decoder)
    spec.register_source_vocabulary(pieces["en"])
    spec.register_target_vocabulary(pieces["de"])
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    spec.validate()
    spec.optimize()
    converted.mkdir()
    spec.save(str(converted))


OPENNMT: dict[str, dict[str, Any]] = {
    "base": {},
    "everything shared, gelu": {"share_embeddings": True, "share_decoder_embeddings": True, "pos_ffn_activation_fn": "gelu"},
    "without biases": {"add_qkvbias": False, "add_ffnbias": False},
    "version 2": {},
}


def opennmt(name: str, work: Path) -> Origin:
    directory = work / "opennmt"
    directory.mkdir()
    settings = {**origins.OPENNMT_SETTINGS, **OPENNMT[name]}
    source_model = tiny_sentencepiece()
    target_model = source_model if settings["share_embeddings"] else train_sentencepiece(GERMAN_LINES, vocab_size=50)
    source_pieces, target_pieces = opennmt_pieces(source_model), opennmt_pieces(target_model)
    if name == "version 2":
        # Where the sides do not share a vocabulary, that of the source has neither start nor end.
        del source_pieces[2:4]
    arrays = origins.opennmt_arrays(settings, (len(source_pieces), len(target_pieces)), seed=7)
    state = {key: torch.from_numpy(array) for key, array in arrays.items()}
    document = {
        "model": {key: tensor for key, tensor in state.items() if not key.startswith("generator.")},
        "generator": {key.removeprefix("generator."): tensor for key, tensor in state.items() if key.startswith("generator.")},
        "vocab": {"src": source_pieces, "tgt": target_pieces, "data_task": "seq2seq", "decoder_start_token": "<s>"},
        "opt": argparse.Namespace(**settings),
        "optim": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        if name == "version 2":
            document["vocab"] = torchtext_fields(ToolClasses(patch), source_pieces, target_pieces)
        torch.save(document, directory / "model_step_1000.pt")
        converter = ctranslate2.converters.OpenNMTPyConverter(str(directory / "model_step_1000.pt"), unsafe_deserialization=True)
        converter.convert(str(work / "converted"))
    (directory / "source.spm").write_bytes(source_model)
    (directory / "target.spm").write_bytes(target_model)
    (directory / "samples.txt").write_text("\n".join(ENGLISH_LINES[:4]))
    return Origin(
        Subject(directory, work),
        lambda source, prefix: origins.opennmt_logits(settings, arrays, source, prefix),
        TwoSidedPeer(work / "converted", source_pieces, target_pieces),
        target_pieces,
        sources_end=False,
    )


def torchtext_fields(classes: ToolClasses, source_pieces: list[str], target_pieces: list[str]) -> dict[str, Any]:
    """The vocabularies of versions 1 and 2, which CTranslate2's converter loads as objects, and we do not."""
    source = classes.field(classes.vocab(source_pieces))
    target = classes.field(classes.vocab(target_pieces), init_token="<s>", eos_token="</s>")
    return {"src": classes.multi_field("src", source), "tgt": classes.multi_field("tgt", target)}


def opennmt_pieces(serialized: bytes) -> list[str]:
    pieces = marian_vocabulary(serialized, seed=0)
    return ["<unk>", "<blank>", "<s>", "</s>", *(piece for piece in pieces if piece not in ("</s>", "<unk>", "<pad>"))]


ORIGINS: dict[str, tuple[Callable[[str, Path], Origin], Iterable[str]]] = {
    "marian": (marian, MARIAN),
    "fairseq": (fairseq, FAIRSEQ),
    "opennmt": (opennmt, OPENNMT),
}


@pytest.fixture(scope="module", params=[f"{kind}: {name}" for kind, (_, names) in ORIGINS.items() for name in names])
def origin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Origin:
    kind, name = request.param.split(": ")
    make, _ = ORIGINS[kind]
    return make(name, tmp_path_factory.mktemp("origin"))


def test_logits_are_the_same(origin: Origin) -> None:
    config = origin.subject.checkpoint.config
    model = build_model(origin.subject.checkpoint)
    allowed = [i for i in range(config.target_vocab_size) if i not in config.never_decoded]
    rng = np.random.default_rng(2)
    for source in origin.sources()[:20]:
        prefix = rng.choice(allowed, rng.integers(1, 15)).tolist()
        its = origin.logits(list(source), prefix)
        with torch.no_grad():
            mine = model(torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[config.decoder_start_id, *prefix]]))
        assert its.std() > 0.5
        assert np.abs(mine[0, :, : its.shape[1]].numpy() - its).max() <= LOGIT_TOLERANCE


def compare(origin: Origin, options: DecodingOptions) -> Comparison:
    sources = origin.sources()
    ours = [hypotheses[0] for hypotheses in origin.subject.decode(sources, options)]
    theirs = origin.peer.decode([source[:-1] if origin.sources_end else source for source in sources], options)
    comparison = Comparison(ours, theirs, options)
    comparison.tell(origin.subject.checkpoint.name)
    return comparison


@pytest.mark.parametrize("beam_size", [1, 4])
def test_translations_are_the_same(origin: Origin, beam_size: int) -> None:
    """Without a length penalty, with which the two end a beam search at different times (see ``test_ctranslate2.py``)."""
    config = origin.subject.checkpoint.config
    options = DecodingOptions(
        beam_size=beam_size,
        length_penalty=0.0,
        max_target_tokens=MAX_TARGET_TOKENS,
        # So that CTranslate2 leaves out of its probabilities what we never decode. Marian's start is no token there.
        suppressed=tuple((i,) for i in config.never_decoded if i < len(origin.target_pieces)),
    )
    comparison = compare(origin, options)
    assert comparison.different == []
    assert comparison.apart <= LOG_PROB_TOLERANCE
    # A random model likes to end at once or not at all; if all did the first there would be nothing to compare.
    assert max(mine.target_tokens for mine in comparison.ours) > 5
