"""Marian's own models as Marian itself trains, decodes and scores them, and as we do: the same n-best lists, the same scores.

Small models are trained here for a few updates, by pymarian on the CPU, and exported from the files as Marian left them. Marian
decodes one sentence at a time: how long a translation may become follows from the longest source of a batch there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch

from export.checkpoint import Checkpoint, build_model, read_checkpoint
from serving.config import EngineConfig, RequestLimits
from serving.manifest import MarianTokenizerSpec, TokensTokenizerSpec
from serving.model import limits_of
from serving.preparation import TextPreparer
from serving.request import DecodingOptions, Outcome
from serving.request_options import RequestOptions
from serving.tokenizers import Tokenizer, load_tokenizer
from tests.peers.subject import Subject
from tests.support import ENGLISH_LINES, GERMAN_LINES, score_of

# Not imported: it brings a gigabyte of libraries, whose threads are not to meet those of torch.
if importlib.util.find_spec("_pymarian") is None:
    pytest.skip("pymarian is not installed; pip install pymarian does it, where there is a wheel", allow_module_level=True)

pytestmark = pytest.mark.slow

UPDATES = 60
SOURCES = 100
SCORE_TOLERANCE = 1e-3
LEAST_SAME = 0.97
WIDTH = 4
# Its commands: train, decode, score.
MARIAN = "import sys, _pymarian; sys.exit(_pymarian.main(sys.argv[1:]))"
# Of the search, as training writes them into ``decoder.yml``.
SETTINGS = {"beam-size": "6", "normalize": "0.6"}
# Of marian-decoder.
MAX_LENGTH_FACTOR = 3
_ROUNDS = 20

JOINT = ("vocab.spm", "vocab.spm")
SEPARATE = ("vocab.en.yml", "vocab.de.yml")
PRE_NORM = {"transformer-preprocess": "n", "transformer-postprocess": "da", "transformer-postprocess-top": "n"}


@dataclass(frozen=True)
class Kind:
    """Which vocabularies a model is trained with, and which settings."""

    vocabularies: tuple[str, str]
    settings: dict[str, str]


KINDS = {
    "joint SentencePiece, all tied": Kind(JOINT, {"tied-embeddings-all": ""}),
    "words, tied output, relu": Kind(SEPARATE, {"tied-embeddings": "", "transformer-ffn-activation": "relu"}),
    "nothing tied, no bias of the output": Kind(SEPARATE, {"output-omit-bias": ""}),
    "a norm after the embedding, gelu": Kind(
        JOINT,
        {
            "tied-embeddings": "",
            "tied-embeddings-src": "",
            "transformer-postprocess-emb": "nd",
            "transformer-ffn-activation": "gelu",
            "transformer-depth-scaling": "",
        },
    ),
    "tied layers, a wider decoder": Kind(
        JOINT, {"tied-embeddings-all": "", "transformer-tied-layers": "1 1", "transformer-decoder-dim-ffn": "96"}
    ),
    "positions said to be trained": Kind(JOINT, {"tied-embeddings-src": "", "transformer-train-position-embeddings": ""}),
}


class Marian:
    """A model in a directory, as Marian's command sees it."""

    def __init__(self, directory: Path, vocabularies: tuple[str, str]) -> None:
        self.model = directory / "model.npz"
        self._vocabularies = [str(directory / name) for name in vocabularies]

    def train(self, settings: dict[str, str]) -> None:
        """From nothing, on the few sentences that the tests have."""
        corpora = []
        for name, lines in (("corpus.en", ENGLISH_LINES), ("corpus.de", GERMAN_LINES)):
            corpora.append(str(self.model.with_name(name)))
            Path(corpora[-1]).write_text("\n".join(lines * _ROUNDS) + "\n")
        its = {
            "type": "transformer",
            "enc-depth": "2",
            "dec-depth": "2",
            "dim-emb": "32",
            "transformer-heads": "4",
            "transformer-dim-ffn": "64",
            "dim-vocabs": "80 80",
            "learn-rate": "0.003",
            "mini-batch": "16",
            "after": f"{UPDATES}u",
            "seed": "7",
            "workspace": "256",
            **SETTINGS,
            **settings,
        }
        options = [part for name, value in its.items() for part in (f"--{name}", *value.split())]
        self._run("train", "-m", str(self.model), "-t", *corpora, *options)

    def n_best(self, sources: list[str], **options: str | float) -> list[list[tuple[str, float]]]:
        """Pieces with spaces between, and the score, of each hypothesis."""
        named = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        return self._n_best(sources, "-m", str(self.model), *named)

    def n_best_by_its_own_settings(self, sources: list[str]) -> list[list[tuple[str, float]]]:
        """The same with the ``decoder.yml`` that training has written beside the model."""
        return self._n_best(sources, "-c", f"{self.model}.decoder.yml")

    def _n_best(self, sources: list[str], *options: str) -> list[list[tuple[str, float]]]:
        flags = ["--n-best", "--mini-batch", "1", "--maxi-batch", "1", "--no-spm-decode"]
        answer = self._run("decode", *options, *flags, sources=sources)
        found: list[list[tuple[str, float]]] = [[] for _ in sources]
        for line in answer.splitlines():
            number, pieces, _, score = line.split(" ||| ")
            found[int(number)].append((pieces, float(score)))
        return found

    def log_probabilities(self, sources: list[str], targets: list[str]) -> list[float]:
        """Of targets that are given."""
        paths = []
        for name, lines in (("given.en", sources), ("given.de", targets)):
            paths.append(str(self.model.with_name(name)))
            Path(paths[-1]).write_text("\n".join(lines) + "\n")
        answer = self._run("score", "-m", str(self.model), "--mini-batch", "1", "-t", *paths)
        return [float(line) for line in answer.split()]

    def _run(self, command: str, *options: str, sources: list[str] | None = None) -> str:
        # In a process of its own: Marian aborts where it does not like a setting, and takes all threads.
        done = subprocess.run(
            [sys.executable, "-c", MARIAN, command, *options, "-v", *self._vocabularies, "--cpu-threads", "1", "--quiet"],
            input="" if sources is None else "\n".join(sources) + "\n",
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@dataclass(frozen=True)
class Pair:
    """A model, as Marian has it and as we do."""

    marian: Marian
    subject: Subject
    sources: list[str]

    @property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.subject.bundle("fp32"))

    def source_ids(self) -> list[tuple[int, ...]]:
        eos_id = self.subject.checkpoint.config.eos_id
        return [(*self.tokenizer.encode(line), eos_id) for line in self.sources]


def made(kind: Kind, work: Path) -> Pair:
    directory = work / "model"
    directory.mkdir()
    marian = Marian(directory, kind.vocabularies)
    marian.train(kind.settings)
    (directory / "samples.txt").write_text("\n".join(ENGLISH_LINES[:4]))
    words = " ".join(ENGLISH_LINES).split()
    # Sentences that it has seen, and others of the same words.
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (SOURCES - len(ENGLISH_LINES),), generator=drawn).tolist()
    others = [" ".join(words[i] for i in torch.randint(len(words), (length,), generator=drawn).tolist()) for length in lengths]
    return Pair(marian, Subject(directory, work), [*ENGLISH_LINES, *others])


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(KINDS[request.param], tmp_path_factory.mktemp("marian"))


@pytest.mark.parametrize(
    ("width", "normalize", "word_penalty"),
    [(1, 0.0, 0.0), (WIDTH, 0.6, 0.0), (WIDTH, 1.0, 0.3)],
    ids=["greedy", "beams", "beams with a word penalty"],
)
def test_n_best_lists(pair: Pair, width: int, normalize: float, word_penalty: float) -> None:
    unknown_id = pair.tokenizer.unknown_target_id
    assert pair.subject.checkpoint.defaults.passed_over_id == unknown_id

    def options(source: tuple[int, ...]) -> DecodingOptions:
        return DecodingOptions(
            beam_size=width,
            num_hypotheses=width,
            length_penalty=normalize,
            word_penalty=word_penalty,
            max_target_tokens=MAX_LENGTH_FACTOR * len(source),
            shrinking_beam=True,
            passed_over_id=unknown_id,
        )

    its = pair.marian.n_best(pair.sources, beam_size=width, normalize=normalize, word_penalty=word_penalty)
    outcomes = pair.subject.outcomes([(source, options(source)) for source in pair.source_ids()])
    assert_same_lists(pair, its, outcomes)


def test_n_best_lists_by_the_defaults_of_the_bundle(pair: Pair) -> None:
    """A request that says nothing but how many beams, and marian-decoder with nothing but its ``decoder.yml``."""
    manifest, width = pair.subject.bundle("fp32").manifest, pair.subject.checkpoint.num_beams
    assert width == int(SETTINGS["beam-size"])
    preparer = TextPreparer(
        tokenizer=pair.tokenizer,
        eos_id=manifest.ids.eos,
        languages=(),
        defaults=manifest.defaults,
        limits=limits_of(manifest, EngineConfig(), RequestLimits()),
    )
    request = RequestOptions(beam_size=width, num_hypotheses=width, return_scores=True)
    asked = [(source, preparer.decoding_options(request, len(source))) for source in pair.source_ids()]
    assert {options.length_penalty for _, options in asked} == {float(SETTINGS["normalize"])}
    assert_same_lists(pair, pair.marian.n_best_by_its_own_settings(pair.sources), pair.subject.outcomes(asked))


def assert_same_lists(pair: Pair, its: list[list[tuple[str, float]]], outcomes: list[Outcome]) -> None:
    same, largest = 0, 0.0
    for theirs, outcome in zip(its, outcomes, strict=True):
        ours = [(" ".join(pair.tokenizer.target_pieces(one.target_ids)), score_of(one)) for one in outcome.hypotheses]
        if [pieces for pieces, _ in theirs] == [pieces for pieces, _ in ours]:
            same += 1
            largest = max(largest, *(abs(a - b) for (_, a), (_, b) in zip(theirs, ours, strict=True)))
    print(f"{same} of {len(its)} n-best lists of {len(its[0])} are the same, scores differ by {largest:.1e} at most")
    # Marian adds up in float32: in the longest, which repeat one word, what is 2e-5 better there may be worse here.
    assert same >= LEAST_SAME * len(its)
    assert largest < SCORE_TOLERANCE


def test_scores_of_given_targets(pair: Pair) -> None:
    assert_same_scores(pair)


def test_a_model_with_norms_before_is_as_it_was_trained(tmp_path: Path) -> None:
    """Marian's scorer, which computes as in training, agrees; its decoder does not agree with its scorer."""
    pair = made(Kind(SEPARATE, {**PRE_NORM, "tied-embeddings": ""}), tmp_path)
    assert_same_scores(pair)
    decoded = pair.marian.n_best(pair.sources[:20], beam_size=1, normalize=0.0)
    ended = [
        (source, *hypotheses[0])
        for source, hypotheses in zip(pair.sources, decoded, strict=False)
        if len(hypotheses[0][0].split()) + 1 < MAX_LENGTH_FACTOR * (len(source.split()) + 1)
    ]
    scored = pair.marian.log_probabilities([source for source, _, _ in ended], [pieces for _, pieces, _ in ended])
    assert max(abs(score - other) for (_, _, score), other in zip(ended, scored, strict=True)) > 0.1
    (warning,) = (warning for warning in pair.subject.checkpoint.warnings if "transformer-preprocess" in warning)
    assert "marian-decoder leaves it out" in warning


def test_a_vocabulary_that_was_made_for_a_larger_model(tmp_path: Path) -> None:
    pair = made(Kind(SEPARATE, {}), tmp_path)
    pair.marian.train({"dim-vocabs": "30 40", "no-reload": "", "overwrite": ""})
    cut = Pair(pair.marian, Subject(pair.subject.directory, tmp_path / "cut"), pair.sources)
    assert sum("are left out" in warning for warning in cut.subject.checkpoint.warnings) == 2
    assert cut.subject.checkpoint.config.target_vocab_size == 41
    assert_same_scores(cut)


def assert_same_scores(pair: Pair) -> None:
    checkpoint = read_checkpoint(pair.marian.model)
    config, model = checkpoint.config, build_model(checkpoint).eval()
    sources, targets = pair.sources[:8], list(GERMAN_LINES[:8])
    differences = []
    for source, target, theirs in zip(sources, targets, pair.marian.log_probabilities(sources, targets), strict=True):
        source_ids = [*pair.tokenizer.encode(source), config.eos_id]
        target_ids = [*encoded(target, checkpoint), config.eos_id]
        with torch.no_grad():
            prefix = torch.tensor([[config.decoder_start_id, *target_ids[:-1]]])
            logits = model(torch.tensor([source_ids]), torch.tensor([len(source_ids)]), prefix)[0].double()
        # The start token, which the export added, is none of Marian's.
        log_probs = logits[:, : config.target_vocab_size - 1].log_softmax(-1)
        differences.append(abs(float(log_probs[range(len(target_ids)), target_ids].sum()) - theirs))
    print(f"log-probabilities of {len(targets)} given targets differ by {max(differences):.1e} at most")
    assert max(differences) < SCORE_TOLERANCE


def encoded(target: str, checkpoint: Checkpoint) -> list[int]:
    """As Marian cuts it; words that it does not know are unknown tokens."""
    spec, files = checkpoint.tokenizer, checkpoint.tokenizer_files
    assert isinstance(spec, (MarianTokenizerSpec, TokensTokenizerSpec))
    contents = files[spec.target_vocabulary]
    assert isinstance(contents, bytes)
    ids = json.loads(contents)
    pieces = target.split()
    if isinstance(spec, MarianTokenizerSpec):
        path = files[spec.target_model]
        assert isinstance(path, Path)
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes()).encode(target, out_type=str)
    return [ids.get(piece, ids["<unk>"]) for piece in pieces]
