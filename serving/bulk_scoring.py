"""Many lines and their targets in, scores out in the same order, by requests of several lines each.

Knows pairs of lines, a client and a model in this process; does not know the command line or how a score is made.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from serving.bulk import through_server
from serving.client import TranslationClient
from serving.errors import InvalidRequestError
from serving.model import ServedModel
from serving.remote_answers import RemoteScore
from serving.scoring import ScoredTarget
from serving.translator import ScoreCommand, Translator

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """What all of them have in common."""

    # Empty: whatever the model translates.
    source_language: str = ""
    target_language: str = ""
    # Of each but the last.
    lines_per_request: int
    in_flight: int

    def of_at_most(self, lines: int) -> Requests:
        """Within what one request may have."""
        return replace(self, lines_per_request=min(self.lines_per_request, lines))


def with_targets(lines: Iterable[str], targets: Iterable[str]) -> Iterator[Pair]:
    """Each line and the target that is scored for it.

    Raises:
        InvalidRequestError: there are fewer of the ones than of the others. Pairs before are still there.
    """
    for number, (line, target) in enumerate(itertools.zip_longest(lines, targets), start=1):
        if target is None:
            raise InvalidRequestError(f"line {number}", f"has no target: there are {number - 1}")
        if line is None:
            raise InvalidRequestError("targets", f"must be as many as lines, {number - 1}, not more")
        yield line, target


def scored_by_server(pairs: Iterable[Pair], client: TranslationClient, requests: Requests) -> Iterator[RemoteScore]:
    """Scores from a server; pairs before a bad request are still answered, then its error is raised.

    Raises:
        OnnxlateError: as ``TranslationClient.score``; names the line.
    """

    def score(some: list[Pair]) -> list[RemoteScore]:
        return client.score(
            [text for text, _ in some],
            [target for _, target in some],
            source_language=requests.source_language,
            target_language=requests.target_language,
        )

    return through_server(pairs, score, lines_per_request=requests.lines_per_request, requests_in_flight=requests.in_flight)


def scored_by_model(pairs: Iterable[Pair], model: ServedModel, requests: Requests) -> Iterator[ScoredTarget]:
    """Scores from a model in this process, whose queue has room for all requests in flight; otherwise as ``scored_by_server``.

    Raises:
        OnnxlateError: as ``Translator.score``; names the line.
    """

    def score(some: list[Pair]) -> list[ScoredTarget]:
        command = ScoreCommand(
            texts=[text for text, _ in some],
            targets=[target for _, target in some],
            source_language=requests.source_language,
            target_language=requests.target_language,
            deadline_s=math.inf,
        )

        async def answer() -> list[ScoredTarget]:
            return await Translator(model.preparer, model.engine, asyncio.get_running_loop()).score(command)

        return asyncio.run(answer())

    return through_server(pairs, score, lines_per_request=requests.lines_per_request, requests_in_flight=requests.in_flight)
