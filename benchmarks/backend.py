"""CTranslate2's kernels: MKL or oneDNN, whichever is faster here. By itself it takes MKL on Intel's CPUs, oneDNN on others."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks import peers, race
from benchmarks.experiment import Setting
from benchmarks.models import BenchModel
from benchmarks.peers.base import Answer, Job, PeerSpec, Split
from benchmarks.results import Measurement, Precision
from benchmarks.sentences import random_sources

# Environment variables that choose the backend -> its name.
_BACKENDS = {"0": "oneDNN", "1": "MKL"}
_VARIABLE = "CT2_USE_MKL"
_BATCH, _SOURCE_TOKENS, _TARGET_TOKENS = 8, 33, 16
_EFFORT = race.Effort(min_seconds=0.2, min_rounds=2, max_rounds=3)


@dataclass(frozen=True, slots=True)
class Backend:
    """What was chosen."""

    environment: dict[str, str] = field(default_factory=dict)
    # What was tried and how it went.
    notes: tuple[str, ...] = ()


def choose(model: BenchModel, precision: Precision, setting: Setting) -> Backend:
    """Try both on a small job; where neither runs, or there is a GPU, CTranslate2's own choice stands."""
    if setting.device != "cpu" or (setting.peers and peers.CTRANSLATE2 not in setting.peers):
        return Backend()
    split = Split(setting.cores, 1)

    def specs() -> list[PeerSpec]:
        directory = model.directory_for(peers.CTRANSLATE2, precision)
        return [
            PeerSpec(
                peer=peers.CTRANSLATE2, directory=directory, precision=precision, split=split, environment={_VARIABLE: value}
            )
            for value in _BACKENDS
        ]

    # Ids that every vocabulary here has as ordinary pieces; where the sources end matters little, as the length is forced.
    sources = random_sources(_BATCH * setting.cores, _SOURCE_TOKENS, range(10, 1000), 0)
    job = Job(sources=sources, batch=_BATCH, min_target_tokens=_TARGET_TOKENS, max_target_tokens=_TARGET_TOKENS)
    with race.opened({peers.CTRANSLATE2: specs}) as runners:
        answers = race.race(runners, race.same_for_all(job), _EFFORT)
    return fastest({lane.process.spec.environment[_VARIABLE]: found for lane, found in answers.items()}, precision)


def fastest(answers: dict[str, list[Answer]], precision: Precision) -> Backend:
    """The choice among answers by the variable's value; no choice where there are none."""
    speeds = {
        value: Measurement(tuple(a.target_tokens / a.seconds for a in found), "tokens/s").median
        for value, found in answers.items()
    }
    if not speeds:
        return Backend()
    chosen = max(speeds, key=lambda value: speeds[value])
    tried = ", ".join(f"{_BACKENDS[value]} {speed:.0f} tokens/s" for value, speed in speeds.items())
    note = f"CTranslate2 {precision} runs on {_BACKENDS[chosen]} ({_VARIABLE}={chosen}); tried at batch {_BATCH}: {tried}"
    return Backend({_VARIABLE: chosen}, (note,))
