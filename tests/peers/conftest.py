"""The checkpoints that are compared with the peers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.marian import write_marian
from export.checkpoint.native import WEIGHTS_NAME
from tests.peers.subject import Subject
from tests.support import EOS_ID, write_tiny_checkpoint

if TYPE_CHECKING:
    from tests.peers.ctranslate2_peer import Peers

TRAINED = Path(__file__).parents[2] / "examples" / "multi30k" / "checkpoint"


def write_random_checkpoint(directory: Path) -> Path:
    """The tiny random model, with an end-of-sentence token that is likely enough for hypotheses to end, and at any length.

    All last states of the decoder contain the bias of its last norm. Added to the token's output weights, divided by its squared
    length, it raises the token's logit by 1.
    """
    write_tiny_checkpoint(directory, seed=2)
    tensors = load_file(directory / WEIGHTS_NAME)
    bias = tensors["decoder.layers.0.feed_forward_residual.norm.bias"]
    tensors["decoder.embedding.tokens.weight"][EOS_ID] += bias / bias.square().sum()
    save_file(tensors, directory / WEIGHTS_NAME)
    return directory


@pytest.fixture(scope="session", params=["tiny", "trained"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A random model, whose answers are unlikely, and the trained one of the example."""
    work = tmp_path_factory.mktemp(f"peers-{request.param}")
    if request.param == "tiny":
        return Subject(write_random_checkpoint(work / "checkpoint"), work)
    if not TRAINED.is_dir():
        pytest.skip("the trained checkpoint is not there: examples/multi30k/checkpoint")
    return Subject(TRAINED, work)


@pytest.fixture(scope="session")
def marian_directory(subject: Subject) -> Path:
    """The same weights as a Hugging Face Marian model."""
    return write_marian(subject.checkpoint, subject.work / "marian")


@pytest.fixture(scope="session")
def ctranslate2_peers(subject: Subject, marian_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """CTranslate2's model of the subject, in fp32 and in int8."""
    # Here, because it skips where CTranslate2 is not installed.
    from benchmarks.conversion import convert_without_padding_rules, pieces_of
    from tests.peers.ctranslate2_peer import Peer

    pieces = pieces_of(subject.checkpoint)
    work = tmp_path_factory.mktemp(f"ctranslate2-{subject.checkpoint.name}")
    peers: Peers = {}
    for precision in ("fp32", "int8"):
        directory = convert_without_padding_rules(marian_directory, pieces, work / precision, precision)
        peers[precision] = Peer(directory, pieces, precision)
    return peers
