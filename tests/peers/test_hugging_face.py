"""Our model and our search against Hugging Face ``MarianMTModel.generate`` on the same weights, hypothesis by hypothesis.

How the options correspond: ``max_new_tokens`` and ``max_target_tokens`` both count the end-of-sentence token, ``min_new_tokens``
and ``min_target_tokens`` both do not, ``length_penalty`` divides by the length with that token on both sides, and
``early_stopping=False`` is the rule by which our beams end. Padding and start token, which we never decode, have a bias of minus
infinity in the Marian model as in our graphs; the last test says how Hugging Face's ``suppress_tokens`` differs from that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.checkpoint import build_model
from serving.request import DecodingOptions, FinishReason, Hypothesis
from tests.peers.subject import Subject
from tests.support import score_of

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed; make test-peers does it")

pytestmark = pytest.mark.slow

LOGIT_TOLERANCE = 1e-4
# Of a hypothesis's log-probability; a score, which is that divided by length^length_penalty, may be off by as much less.
LOG_PROB_TOLERANCE = 1e-4
# Where two hypotheses are equally good to within the tolerance, rounding decides. Of all hypotheses, at most so many.
MOST_TIES = 0.005
MAX_TARGET_TOKENS = 40
# Sources that Hugging Face pads and decodes together.
BATCH = 24

# Ids without start and end, and the score.
Answer = tuple[tuple[int, ...], float]


@pytest.fixture(scope="module")
def marian(marian_directory: Path) -> Any:
    """The model as Hugging Face reads it, with its own position table."""
    model, info = transformers.MarianMTModel.from_pretrained(marian_directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.fixture(scope="module")
def sources(subject: Subject) -> list[tuple[int, ...]]:
    return subject.sources()


def padded(rows: list[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids [rows, longest], padded to the right, and the length of each."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, lengths


def generate(marian: Any, sources: list[tuple[int, ...]], options: DecodingOptions, **processors: Any) -> list[list[Answer]]:
    """What Hugging Face makes of each source, best first; ``processors`` are further options of its own."""
    answers = []
    for start in range(0, len(sources), BATCH):
        ids, lengths = padded(sources[start : start + BATCH], marian.config.pad_token_id)
        generated = marian.generate(
            ids,
            attention_mask=(torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            do_sample=False,
            num_beams=options.beam_size,
            num_return_sequences=options.num_hypotheses,
            early_stopping=False,
            length_penalty=options.length_penalty if options.beam_size > 1 else None,
            min_new_tokens=options.min_target_tokens or None,
            max_new_tokens=options.max_target_tokens,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **processors,
        )
        answers += answers_of(generated, marian.config.eos_token_id, options)
    return answers


def answers_of(generated: Any, eos_id: int, options: DecodingOptions) -> list[list[Answer]]:
    """The answers to each source of one call of ``generate``."""
    rows = [row[1:] for row in generated.sequences.tolist()]
    lengths = [row.index(eos_id) + 1 if eos_id in row else len(row) for row in rows]
    if options.beam_size > 1:
        scores = generated.sequences_scores.tolist()
    else:  # greedy search tells no scores of its own
        log_probs = torch.stack(generated.logits, dim=1).log_softmax(-1)  # [sources, steps, vocabulary]
        taken = log_probs.gather(2, torch.tensor(rows)[:, :, None])[:, :, 0].double()
        scores = [float(taken[i, :n].sum()) / n**options.length_penalty for i, n in enumerate(lengths)]
    flat = [
        (tuple(token for token in row[:n] if token != eos_id), score) for row, n, score in zip(rows, lengths, scores, strict=True)
    ]
    return [flat[i : i + options.num_hypotheses] for i in range(0, len(flat), options.num_hypotheses)]


@dataclass
class Report:
    """How two sets of answers compare."""

    length_penalty: float
    hypotheses: int = 0
    ended: int = 0
    largest_difference: float = 0.0
    ties: int = 0
    differences: list[str] = field(default_factory=list)

    def add(self, source: tuple[int, ...], ours: tuple[Hypothesis, ...], theirs: list[Answer]) -> None:
        """Compare one source's hypotheses rank by rank."""
        assert len(ours) == len(theirs)
        for rank, (mine, (ids, score)) in enumerate(zip(ours, theirs, strict=True)):
            self.hypotheses += 1
            self.ended += mine.finish_reason is FinishReason.EOS
            apart = abs(score_of(mine) - score) * mine.target_tokens**self.length_penalty
            if apart > LOG_PROB_TOLERANCE:
                self.differences.append(f"{source} rank {rank}: {mine.target_ids} {mine.score:.6f}, theirs {ids} {score:.6f}")
            elif mine.target_ids != ids:
                self.ties += 1
            else:
                self.largest_difference = max(self.largest_difference, apart)

    def check(self, setting: str) -> None:
        """Print the figures and fail if they are not good enough."""
        print(
            f"{setting}: {self.hypotheses} hypotheses, {self.ended} of them ended by themselves, {self.ties} ties, "
            f"largest difference of log-probabilities {self.largest_difference:.1e}"
        )
        assert not self.differences, "\n".join([f"{len(self.differences)} of {self.hypotheses}", *self.differences[:5]])
        assert self.ties <= MOST_TIES * self.hypotheses


def compare(subject: Subject, marian: Any, sources: list[tuple[int, ...]], options: DecodingOptions) -> None:
    report = Report(options.length_penalty)
    answers = zip(sources, subject.decode(sources, options), generate(marian, sources, options), strict=True)
    for source, ours, theirs in answers:
        report.add(source, ours, theirs)
    report.check(f"{subject.checkpoint.name}, {len(sources)} sentences, {options}")


def test_there_are_enough_sentences(sources: list[tuple[int, ...]]) -> None:
    assert len(set(sources)) >= 50
    assert len(sources[-1]) > 2 * len(sources[0])


def test_logits_are_the_same(subject: Subject, marian: Any, sources: list[tuple[int, ...]]) -> None:
    config = subject.checkpoint.config
    source_ids, lengths = padded(sources, config.pad_id)
    answers = subject.decode(sources, DecodingOptions(max_target_tokens=MAX_TARGET_TOKENS))
    target_ids, _ = padded([(config.decoder_start_id, *best.target_ids) for (best,) in answers], config.pad_id)
    mask = (torch.arange(source_ids.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        ours = build_model(subject.checkpoint)(source_ids, lengths, target_ids)
        theirs = marian(input_ids=source_ids, attention_mask=mask, decoder_input_ids=target_ids).logits
    forbidden = subject.checkpoint.config.never_decoded
    assert theirs[:, :, forbidden].max() < -1e8
    allowed = [token for token in range(config.target_vocab_size) if token not in forbidden]
    apart = (ours - theirs)[:, :, allowed].abs().max().item()
    print(f"{subject.checkpoint.name}: {target_ids.numel()} places, largest logit difference {apart:.1e}")
    assert apart <= LOGIT_TOLERANCE
    # Large enough that agreement within the tolerance says something.
    assert ours[:, :, allowed].std() > 0.1


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_greedy_is_the_same(subject: Subject, marian: Any, sources: list[tuple[int, ...]], length_penalty: float) -> None:
    compare(subject, marian, sources, DecodingOptions(length_penalty=length_penalty, max_target_tokens=MAX_TARGET_TOKENS))


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("beam_size", [2, 4, 5])
def test_beams_are_the_same(
    subject: Subject, marian: Any, sources: list[tuple[int, ...]], beam_size: int, length_penalty: float
) -> None:
    options = DecodingOptions(
        beam_size=beam_size,
        num_hypotheses=beam_size,
        length_penalty=length_penalty,
        max_target_tokens=MAX_TARGET_TOKENS,
    )
    compare(subject, marian, sources, options)


@pytest.mark.parametrize(
    ("beam_size", "min_target_tokens", "max_target_tokens"),
    [(1, 12, 40), (1, 0, 5), (1, 9, 9), (4, 14, 40), (4, 0, 6), (4, 8, 8), (4, 8, 9), (3, 0, 1)],
)
def test_shortest_and_longest_mean_the_same(
    subject: Subject,
    marian: Any,
    sources: list[tuple[int, ...]],
    beam_size: int,
    min_target_tokens: int,
    max_target_tokens: int,
) -> None:
    options = DecodingOptions(
        beam_size=beam_size,
        num_hypotheses=beam_size,
        min_target_tokens=min_target_tokens,
        max_target_tokens=max_target_tokens,
    )
    compare(subject, marian, sources, options)


def forbidden_mass(marian: Any, source: tuple[int, ...], answers: list[Answer], forbidden: list[int], limit: int) -> list[float]:
    """For each answer, the sum over its steps of log(1 - the probability of all forbidden tokens)."""
    eos_id, start_id = marian.config.eos_token_id, marian.config.decoder_start_token_id
    steps = [min(len(ids) + 1, limit) for ids, _ in answers]
    target_ids, _ = padded([(start_id, *ids)[:n] for (ids, _), n in zip(answers, steps, strict=True)], eos_id)
    with torch.no_grad():
        logits = marian(input_ids=torch.tensor([source] * len(answers)), decoder_input_ids=target_ids).logits
    lost = torch.log1p(-logits.double().softmax(-1)[:, :, forbidden].sum(-1))  # [answers, steps]
    return [float(lost[i, :n].sum()) for i, n in enumerate(steps)]


def test_suppressing_tokens_differs_by_their_probability(
    subject: Subject, marian_directory: Path, sources: list[tuple[int, ...]]
) -> None:
    """Hugging Face suppresses after the softmax, so that what it suppresses keeps its share; we, and CTranslate2, before it."""
    marian = transformers.MarianMTModel.from_pretrained(marian_directory).eval()
    marian.final_logits_bias.zero_()
    forbidden = subject.checkpoint.config.never_decoded
    options = DecodingOptions(beam_size=4, num_hypotheses=4, length_penalty=0.0, max_target_tokens=MAX_TARGET_TOKENS)
    theirs = generate(marian, sources, options, suppress_tokens=forbidden)
    same, largest = 0, 0.0
    for source, ours, answers in zip(sources, subject.decode(sources, options), theirs, strict=True):
        lost = forbidden_mass(marian, source, answers, forbidden, options.max_target_tokens)
        for mine, (ids, log_prob), mass in zip(ours, answers, lost, strict=True):
            if mine.target_ids == ids:
                same += 1
                largest = max(largest, -mass)
                assert score_of(mine) + mass == pytest.approx(log_prob, abs=LOG_PROB_TOLERANCE)
    print(f"{subject.checkpoint.name}: {same} of {4 * len(sources)} the same, log-probabilities up to {largest:.1e} apart")
    # What has hardly any share changes no order; a random model gives these tokens as much as any others.
    assert same >= 0.75 * 4 * len(sources)
