"""Models that OpenNMT-py and fairseq have trained, saved and decoded themselves: our module and engine against what they say.

Each tool's own programs train for some updates, on a few sentences that are tokens already, and translate them greedily and with
beams. Verified with OpenNMT-py 3.5.1 and fairseq 0.12.2; a test is skipped where its tool is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from export.checkpoint import build_model
from serving.request import DecodingOptions
from tests.peers.subject import Subject
from tests.support import ENGLISH_LINES, GERMAN_LINES

pytestmark = pytest.mark.slow

# Of a sum of log-probabilities, which OpenNMT-py prints with four digits.
SUM_TOLERANCE = 1e-3
BEAM_SIZE = 4
MAX_TARGET_TOKENS = 30

OPENNMT: dict[str, list[str]] = {
    "everything shared": ["-position_encoding", "-share_vocab", "-share_embeddings", "-share_decoder_embeddings"],
    "two vocabularies, biases, gelu": [
        *("-position_encoding", "-add_qkvbias", "-add_ffnbias"),
        *("-pos_ffn_activation_fn", "gelu"),
    ],
    "sines first, gated": [
        *("-position_encoding", "-position_encoding_type", "SinusoidalConcat"),
        *("-pos_ffn_activation_fn", "gated-gelu", "-decoder_start_token", "</s>"),
    ],
    "root-mean-square norms, safetensors": [
        *("-position_encoding", "-layer_norm", "rms", "-pos_ffn_activation_fn", "silu", "-save_format", "safetensors"),
    ],
}
FAIRSEQ: dict[str, list[str]] = {
    "everything shared": ["--arch", "transformer_iwslt_de_en", "--share-all-embeddings"],
    "pre-norm, gelu": [
        *("--arch", "transformer_wmt_en_de", "--activation-fn", "gelu", "--share-decoder-input-output-embed"),
        *("--encoder-normalize-before", "--decoder-normalize-before", "--source-lang", "en", "--target-lang", "de"),
    ],
    "learned positions, a norm after the embedding": [
        *("--arch", "transformer", "--encoder-learned-pos", "--decoder-learned-pos", "--layernorm-embedding"),
        *("--max-source-positions", "64", "--max-target-positions", "64", "--source-lang", "en", "--target-lang", "de"),
    ],
}


@dataclass(frozen=True)
class Said:
    """A translation as a tool gives it."""

    tokens: list[str]
    # The log-probabilities of the tokens and the end, added up.
    log_prob: float

    @property
    def is_cut(self) -> bool:
        return len(self.tokens) >= MAX_TARGET_TOKENS


# Beam size -> of every source its hypotheses, best first.
Answers = dict[int, list[list[Said]]]


def run(*command: str) -> str:
    """What a tool's program prints."""
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def write_lines(directory: Path) -> None:
    """Sentences of words and signs, without a tokenizer."""
    for language, lines in (("en", ENGLISH_LINES), ("de", GERMAN_LINES)):
        spaced = [" ".join(re.findall(r"\w+|[^\w\s]", line)) for line in lines]
        (directory / f"lines.{language}").write_text("\n".join(spaced) + "\n", encoding="utf-8")


def opennmt(options: list[str], work: Path, directory: Path) -> Answers:
    """Trains and translates; ``directory`` gets the model as it was left."""
    config = {
        "data": {"corpus": {"path_src": f"{work}/lines.en", "path_tgt": f"{work}/lines.de"}},
        "save_data": f"{work}/saved",
        "src_vocab": f"{work}/src",
        "tgt_vocab": f"{work}/{'src' if '-share_vocab' in options else 'tgt'}",
    }
    (work / "config.yaml").write_text(json.dumps(config))
    config_option = ("-config", str(work / "config.yaml"))
    run("onmt.bin.build_vocab", *config_option, "-n_sample", "-1", *(["-share_vocab"] if "-share_vocab" in options else []))
    sizes = "-enc_layers 2 -dec_layers 2 -heads 4 -hidden_size 32 -word_vec_size 32 -transformer_ff 48"
    updates = (
        "-batch_size 16 -bucket_size 64 -train_steps 60 -save_checkpoint_steps 60 -optim adam -learning_rate 0.005 -num_workers 0"
    )
    run(
        *("onmt.bin.train", *config_option, "-save_model", str(directory / "model")),
        *(
            "-encoder_type",
            "transformer",
            "-decoder_type",
            "transformer",
            "-param_init_glorot",
            "-param_init",
            "0",
            "-num_workers",
            "0",
        ),
        *(*sizes.split(), *updates.split(), *options),
    )
    # Its decoder does not find what its trainer wrote: it looks for files with a part's number.
    for path in directory.glob("*.safetensors"):
        shutil.copy(path, path.with_suffix(".00.safetensors"))
    answers = {}
    for beam_size in (1, BEAM_SIZE):
        printed = run(
            *("onmt.bin.translate", "-model", str(directory / "model_step_60.pt"), "-src", f"{work}/lines.en"),
            *("-output", f"{work}/out", "-beam_size", str(beam_size), "-n_best", str(beam_size), "-verbose"),
            *("-length_penalty", "none", "-max_length", str(MAX_TARGET_TOKENS), "-max_length_ratio", "0"),
        )
        score = r"^\[(-?[\d.]+)\] \[" if beam_size > 1 else r"^PRED SCORE: (-?[\d.]+)"
        blocks = re.split(r"SENT \d+: ", printed)[1:]
        lines = iter((work / "out").read_text(encoding="utf-8").split("\n"))
        answers[beam_size] = [
            [Said(next(lines).split(), float(number)) for number in re.findall(score, block, re.M)[:beam_size]]
            for block in blocks
        ]
    return answers


def fairseq(options: list[str], work: Path, directory: Path) -> Answers:
    """Trains and translates; ``directory`` gets the model and its dictionaries."""
    shared = ["--joined-dictionary"] if "--share-all-embeddings" in options else []
    paths = [f"--{part}pref={work}/lines" for part in ("train", "valid", "test")]
    run("fairseq_cli.preprocess", "-s", "en", "-t", "de", *paths, "--destdir", str(directory), *shared)
    sides = [f"--{side}-{size}" for side in ("encoder", "decoder") for size in ("layers=2", "embed-dim=32", "attention-heads=4")]
    run(
        *("fairseq_cli.train", str(directory), *options, *sides, "--encoder-ffn-embed-dim=48", "--decoder-ffn-embed-dim=56"),
        *("--optimizer", "adam", "--lr", "5e-3", "--criterion", "cross_entropy", "--max-tokens", "200", "--max-update", "60"),
        *("--cpu", "--save-dir", str(directory), "--no-epoch-checkpoints", "--disable-validation", "--num-workers", "0"),
    )
    answers = {}
    for beam_size in (1, BEAM_SIZE):
        printed = run(
            *("fairseq_cli.generate", str(directory), "--path", str(directory / "checkpoint_last.pt"), "--cpu"),
            *("--beam", str(beam_size), "--nbest", str(beam_size), "--lenpen", "0", "--max-len-b", str(MAX_TARGET_TOKENS)),
            *("--scoring", "sacrebleu", "--num-workers", "0"),
        )
        found: dict[int, list[Said]] = {}
        for number, log2_prob, tokens in re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", printed, re.M):
            found.setdefault(int(number), []).append(Said(tokens.split(), float(log2_prob) * math.log(2)))
        answers[beam_size] = [found[i] for i in range(len(found))]
    return answers


TOOLS = {"onmt": ("OpenNMT-py", opennmt, OPENNMT), "fairseq": ("fairseq", fairseq, FAIRSEQ)}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, (_, _, names) in TOOLS.items() for name in names])
def test_trained_and_decoded_by_the_tool_itself(module: str, name: str, tmp_path: Path) -> None:
    called, train, variants = TOOLS[module]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{called} is not installed")
    directory = tmp_path / "model"
    directory.mkdir()
    write_lines(tmp_path)
    answers = train(variants[name], tmp_path, directory)
    subject = Subject(directory, tmp_path)
    source_ids, target_ids = (json.loads(contents) for contents in vocabularies_of(subject))
    config = subject.checkpoint.config
    end = (config.eos_id,) if subject.checkpoint.source_ends_with_eos else ()
    lines = (tmp_path / "lines.en").read_text(encoding="utf-8").splitlines()
    sources = [(*(source_ids.get(token, source_ids["<unk>"]) for token in line.split()), *end) for line in lines]

    # Nothing is left out of what is compared.
    for beam_size in (1, BEAM_SIZE):
        assert [len(hypotheses) for hypotheses in answers[beam_size]] == [beam_size] * len(sources)

    # The network: every hypothesis has the log-probability that the tool says.
    model = build_model(subject.checkpoint)
    for source, hypotheses in zip(sources * 2, answers[1] + answers[BEAM_SIZE], strict=True):
        for said in hypotheses:
            ids = [target_ids.get(token, target_ids["<unk>"]) for token in said.tokens]
            with torch.no_grad():
                logits = model(
                    torch.tensor([source]), torch.tensor([len(source)]), torch.tensor([[config.decoder_start_id, *ids]])
                )
            # fairseq ends what is cut; OpenNMT-py leaves it as it is.
            decoded = ids if said.is_cut and module == "onmt" else [*ids, config.eos_id]
            log_probs = logits[0].log_softmax(-1)[range(len(decoded)), decoded]
            assert abs(log_probs.sum().item() - said.log_prob) <= SUM_TOLERANCE

    # Greedy decoding. With beams, models as little trained as these choose by what padding and start take of the probabilities,
    # which are out of them here.
    options = DecodingOptions(
        length_penalty=0.0,
        min_target_tokens=1 if module == "fairseq" else 0,
        max_target_tokens=MAX_TARGET_TOKENS,
    )
    ours = [hypotheses[0] for hypotheses in subject.decode(sources, options)]
    for mine, (best, *_) in zip(ours, answers[1], strict=True):
        ids = [target_ids.get(token, target_ids["<unk>"]) for token in best.tokens]
        assert [token_id for token_id in mine.target_ids if token_id != config.eos_id] == ids


def vocabularies_of(subject: Subject) -> tuple[bytes, bytes]:
    """The files of source and target, which text that comes as tokens is looked up in."""
    spec, files = subject.checkpoint.tokenizer, subject.checkpoint.tokenizer_files
    assert spec.kind == "tokens"
    source, target = files[spec.source_vocabulary], files[spec.target_vocabulary]
    assert isinstance(source, bytes)
    assert isinstance(target, bytes)
    return source, target
