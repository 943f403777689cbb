"""CTranslate2's kernels, MKL or oneDNN, as lanes of their own: which is faster depends on CPU, precision, split and batch.

By itself CTranslate2 takes MKL on Intel's CPUs and oneDNN on others. Knows the variable that says otherwise, and a short trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import peers, race
from benchmarks.peers.base import Answer, Job, PeerSpec, Split
from benchmarks.race import Lane
from benchmarks.results import Measurement
from benchmarks.sentences import random_sources

_VARIABLE = "CT2_USE_MKL"
# Name -> the variable's value.
_BACKENDS = {"oneDNN": "0", "MKL": "1"}
_BATCH, _SOURCE_TOKENS, _TARGET_TOKENS = 8, 33, 8
# So many times slower than the other backend with a batch, none is the faster one without.
_HOPELESS = 4.0
_EFFORT = race.Effort(min_seconds=0.2, min_rounds=2, max_rounds=2)


def variants(spec: PeerSpec) -> list[PeerSpec]:
    """A spec for each backend that CTranslate2 may run it with; the spec itself for others, and on a GPU."""
    if spec.peer != peers.CTRANSLATE2 or spec.device != "cpu":
        return [spec]
    return [replace(spec, environment={_VARIABLE: value}, kernels=name) for name, value in _BACKENDS.items()]


@dataclass(frozen=True, slots=True)
class Choice:
    """The lanes that are measured."""

    # With batches: all that were there but those of a slower backend than another lane of their split has.
    lanes: list[Lane]
    # One source at a time, where another backend may be the better one: all but the hopeless.
    contenders: list[Lane]
    # What was tried and how it went.
    notes: tuple[str, ...] = ()


def choose(lanes: Sequence[Lane]) -> Choice:
    """Try the backends of each split on a short job. A split none of whose lanes answers keeps them all."""
    tried = [lane for lane in lanes if lane.kernels]
    if not tried:
        return Choice(list(lanes), list(lanes))
    # Ids that every vocabulary here has as ordinary pieces; where the sources end matters little, as the length is forced.
    sources = random_sources(_BATCH * max(lane.split.workers for lane in tried), _SOURCE_TOKENS, range(10, 1000), 0)
    job = Job(sources=sources, batch=_BATCH, min_target_tokens=_TARGET_TOKENS, max_target_tokens=_TARGET_TOKENS)
    found = race.race(tried, race.same_for_all(job), _EFFORT)
    slower: set[Lane] = set()
    hopeless: set[Lane] = set()
    notes = []
    for split in dict.fromkeys(lane.split for lane in tried):
        here = {lane: answers for lane, answers in found.answers.items() if lane.split == split}
        lost = {lane: reason for lane, reason in found.lost.items() if lane.split == split}
        if here:
            best = fastest(here)
            slower |= {lane for lane in (*here, *lost) if lane != best}
            hopeless |= {lane for lane in here if _tokens_per_s(here[lane]) * _HOPELESS < _tokens_per_s(here[best])}
            notes.append(_note(split, best, here, lost))
    return Choice([lane for lane in lanes if lane not in slower], [lane for lane in lanes if lane not in hopeless], tuple(notes))


def fastest(answers: dict[Lane, list[Answer]]) -> Lane:
    """The lane with the most tokens a second, by the median."""
    return max(answers, key=lambda lane: _tokens_per_s(answers[lane]))


def _tokens_per_s(answers: Sequence[Answer]) -> float:
    return Measurement(tuple(answer.target_tokens / answer.seconds for answer in answers)).median


def _note(split: Split, best: Lane, answers: dict[Lane, list[Answer]], lost: dict[Lane, str]) -> str:
    figures = [f"{lane.kernels} {_tokens_per_s(some):.0f} tokens/s" for lane, some in answers.items()]
    figures += [f"{lane.kernels} failed ({reason})" for lane, reason in lost.items()]
    return f"CTranslate2 {split} runs batches on {best.kernels}; tried at batch {_BATCH}: {', '.join(figures)}"
