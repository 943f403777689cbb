"""A model that is a table, a cache that is a list of tokens, and a lane that steps them as an engine would.

The toy decoder sees nothing but what the cache holds of a row, so that a wrong copy changes the answer.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import numpy as np

from serving.request import DecodingOptions, Hypothesis
from serving.search import Fork, make_lane_search

START_ID = 77
EOS_ID = 1
# A cache position that nobody has written.
POISON = -9


class ToyModel:
    """Random but repeatable next-token log-probabilities of every prefix."""

    def __init__(self, seed: int, vocabulary: int, eos_bias: float = 0.0, impossible_ids: tuple[int, ...] = ()) -> None:
        self._seed = seed
        self._vocabulary = vocabulary
        self._eos_bias = eos_bias
        self._impossible_ids = impossible_ids
        self._known: dict[tuple[int, ...], list[float]] = {}

    def log_probs(self, prefix: tuple[int, ...]) -> list[float]:
        """Of each token of the vocabulary after a prefix (without the start token); each is a float32."""
        if prefix not in self._known:
            rng = random.Random(f"{self._seed} {prefix}")
            logits = [rng.gauss(0.0, 1.5) for _ in range(self._vocabulary)]
            logits[EOS_ID] += self._eos_bias
            for token in self._impossible_ids:
                logits[token] = -math.inf
            total = math.log(sum(math.exp(logit) for logit in logits))
            self._known[prefix] = [float(np.float32(logit - total)) for logit in logits]
        return self._known[prefix]

    def attention(self, prefix: tuple[int, ...], source_tokens: int) -> list[float]:
        """What the step after a prefix attends to; each is a float32."""
        rng = random.Random(f"{self._seed} {prefix} attention")
        return [float(np.float32(rng.random())) for _ in range(source_tokens)]

    def candidates(self, prefix: tuple[int, ...], k: int) -> tuple[list[int], list[float]]:
        """The k best, best first."""
        log_probs = self.log_probs(prefix)
        ids = sorted(range(self._vocabulary), key=lambda token: -log_probs[token])[:k]
        return ids, [log_probs[token] for token in ids]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A source to decode."""

    name: int
    model: ToyModel
    options: DecodingOptions
    source_tokens: int = 3


@dataclass
class ToyLane:
    """A lane of up to num_slots jobs; forks are applied to the cache in a random order."""

    width: int
    num_slots: int
    vocabulary: int
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    jobs: list[Job] = field(default_factory=list)
    hypotheses: dict[int, tuple[Hypothesis, ...]] = field(default_factory=dict)
    forks: list[Fork] = field(default_factory=list)
    # What each job was sure of after each of its steps but the last.
    decided: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.capacity = 2
        self.search = make_lane_search(self.width, self.num_slots, EOS_ID, START_ID)
        # [rows, capacity], the token whose key and value would be there.
        self.cache = np.full((self.num_slots * self.width, self.capacity), POISON)

    def _rows(self, slot: int) -> slice:
        return slice(slot * self.width, (slot + 1) * self.width)

    def add(self, job: Job) -> None:
        slot = len(self.jobs)
        self.jobs.append(job)
        self.cache[self._rows(slot)] = POISON
        self.search.add(slot, job.options, job.source_tokens)

    def remove(self, slot: int) -> None:
        last = len(self.jobs) - 1
        self.search.leave(slot)
        if slot != last:
            self.search.move(last, slot)
            self.cache[self._rows(slot)] = self.cache[self._rows(last)]
            self.jobs[slot] = self.jobs[last]
        self.jobs.pop()

    def _decode(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Write each row's token into its cache and read its candidates off it, and what stands for its logits if wanted."""
        n, k = len(self.jobs), min(self.search.num_candidates, self.vocabulary)
        positions = self.search.num_tokens[:n].reshape(-1)
        if positions.max() >= self.capacity:
            self.capacity *= 2
            grown = np.full((len(self.cache), self.capacity), POISON)
            grown[:, : self.cache.shape[1]] = self.cache
            self.cache = grown
        rows = np.arange(n * self.width)
        self.cache[rows, positions] = self.search.next_ids[:n].reshape(-1)
        prefixes = [
            (self.jobs[row // self.width].model, tuple(self.cache[row, 1 : position + 1].tolist()))
            for row, position in zip(rows.tolist(), positions.tolist(), strict=True)
        ]
        answers = [model.candidates(prefix, k) for model, prefix in prefixes]
        shape = (n, self.width, k)
        ids = np.array([ids for ids, _ in answers], np.int64).reshape(shape)
        logits = None
        if self.search.needs_logits:
            logits = np.array([model.log_probs(prefix) for model, prefix in prefixes], np.float32).reshape(*shape[:2], -1)
        return ids, np.array([log_probs for _, log_probs in answers], np.float32).reshape(shape), logits

    def _attend(self) -> np.ndarray:
        """What each row's step attends to, read off its cache: [jobs, W, room for the longest source and more]."""
        attention = np.zeros((len(self.jobs), self.width, max(job.source_tokens for job in self.jobs) + 2), np.float32)
        for slot, job in enumerate(self.jobs):
            for beam, row in enumerate(self.cache[self._rows(slot)]):
                prefix = tuple(row[1 : self.search.num_tokens[slot, beam] + 1].tolist())
                attention[slot, beam, : job.source_tokens] = job.model.attention(prefix, job.source_tokens)
        return attention

    def step(self) -> None:
        """One step of all jobs; those that are done leave with their hypotheses."""
        candidates = self._decode()
        attention = self._attend() if self.search.needs_attention else None
        advance = self.search.advance(len(self.jobs), *candidates, attention=attention)
        self.forks = list(advance.forks)
        self.rng.shuffle(self.forks)
        for fork in self.forks:
            self.check_fork(fork)
            assert fork.from_row // self.width not in advance.finished
            self.cache[fork.to_row, fork.start : fork.stop] = self.cache[fork.from_row, fork.start : fork.stop]
        self.check_cache(set(advance.finished))
        for slot in set(range(len(self.jobs))) - set(advance.finished):
            self.decided.setdefault(self.jobs[slot].name, []).append(tuple(self.search.decided(slot)))
        for slot in reversed(advance.finished):
            self.hypotheses[self.jobs[slot].name] = self.search.hypotheses(slot)
            self.remove(slot)

    def check_fork(self, fork: Fork) -> None:
        """It stays within its source, and leaves out what the rows have in common, and nothing else."""
        assert fork.from_row // self.width == fork.to_row // self.width
        assert fork.from_row != fork.to_row
        assert fork.start < fork.stop
        from_row, to_row = self.cache[fork.from_row], self.cache[fork.to_row]
        assert from_row[: fork.start].tolist() == to_row[: fork.start].tolist()
        forced = self.jobs[fork.from_row // self.width].options.target_prefix
        if self.vocabulary > self.width and not forced:  # so that every row holds a hypothesis from the first step on
            assert from_row[fork.start] != to_row[fork.start]

    def check_cache(self, finished: set[int]) -> None:
        """The cache of every row that goes on holds the hypothesis of that row, but for its newest token."""
        for slot in set(range(len(self.jobs))) - finished:
            for beam in range(self.width):
                length = int(self.search.num_tokens[slot, beam])
                tokens = self.search.decoded(slot)[beam]
                assert len(tokens) == length
                row = self.cache[slot * self.width + beam]
                assert row[:length].tolist() == [START_ID, *tokens[:-1]]
                assert self.search.next_ids[slot, beam] == tokens[-1]

    def run(self) -> None:
        """Step until every job is done."""
        while self.jobs:
            self.step()


def decode(job: Job, vocabulary: int) -> tuple[Hypothesis, ...]:
    """What a job comes to in a lane of its own."""
    lane = ToyLane(job.options.beam_size, 1, vocabulary)
    lane.add(job)
    lane.run()
    return lane.hypotheses[job.name]
