"""Text in, translations or scores out: where text stops.

Knows the preparer, the engine's narrow face and the event loop it answers on; does not know messages, gRPC, graphs or scheduling.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from serving.errors import DeadlineExceededError
from serving.mailbox import Mailbox
from serving.preparation import TextPreparer, Translation
from serving.request import DecodingOptions, Outcome, Sequence
from serving.request_options import RequestOptions, check_bias, check_prefixes, check_streamed
from serving.scoring import ScoredTarget, TargetScorer, check_size, check_targets, scoring_options
from serving.tokenizers import StreamingDetokenizer

# Text is tokenized and detokenized on the event loop, a slice at a time: other requests get their turn between slices.
_SLICE_S = 0.002


class DecodingEngine(Protocol):
    """What the translator needs of the engine. None of it blocks."""

    def check_room(self, num_sequences: int) -> None:
        """Whether so many would be admitted now; raises as ``submit``, which has the last word."""

    def submit(self, sequences: Sequence_[Sequence], *, continued: bool = False) -> None:
        """Admit all of them or none; raises OverloadedError or ShuttingDownError. What goes on with a request is admitted."""

    def cancel(self, sequences: Sequence_[Sequence]) -> None:
        """Nobody waits for these any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslateCommand:
    """Translate these texts."""

    texts: Sequence_[str]
    # None, or one for each text: what its translation starts with; an empty one leaves it free.
    target_prefixes: Sequence_[str] = ()
    # Empty: whatever the model translates.
    source_language: str = ""
    target_language: str = ""
    options: RequestOptions = field(default_factory=RequestOptions)
    # Monotonic seconds.
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCommand:
    """Translate this text and tell it as it is decoded."""

    text: str
    target_prefix: str = ""
    source_language: str = ""
    target_language: str = ""
    options: RequestOptions = field(default_factory=RequestOptions)
    # Monotonic seconds.
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreCommand:
    """Say how probable the model finds these translations of these texts."""

    texts: Sequence_[str]
    # One for each text, all of them as text or all as tokens that the vocabulary spells so.
    targets: Sequence_[str] = ()
    target_tokens: Sequence_[Sequence_[str]] = ()
    # Empty: whatever the model translates.
    source_language: str = ""
    target_language: str = ""
    # Monotonic seconds.
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPiece:
    """A piece of a streamed translation."""

    # To append to what came before; never taken back.
    text_delta: str
    # In the last piece only.
    translation: Translation | None = None


class Translator:
    """Answers commands on one event loop. Everything is validated before the engine sees any of it."""

    def __init__(
        self,
        preparer: TextPreparer,
        engine: DecodingEngine,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A translator whose methods are awaited on ``loop``."""
        self.preparer = preparer
        self._engine = engine
        self._loop = loop
        self._mailbox = Mailbox(loop)
        self._clock = clock

    async def translate(self, command: TranslateCommand) -> list[Translation]:
        """Translate every text of ``command``, answers in its order.

        When this is cancelled, or one text fails, the engine is told to drop the others.

        Raises:
            InvalidRequestError: the request is out of bounds; the engine has seen nothing of it.
            OverloadedError: no room; none of the texts was admitted.
            ShuttingDownError: no more requests are admitted.
            DeadlineExceededError: the deadline passed.
            EngineError: a graph failed.
        """
        arrived_at_s = self._clock()
        preparer = self.preparer
        direction = preparer.direction(command.source_language, command.target_language)
        preparer.check_options(command.options)
        preparer.check_count(len(command.texts), command.options)
        check_prefixes(command.target_prefixes, len(command.texts), command.options)
        self._check_room(command.texts, command.options.sequences_per_text)
        turn = _Turn(self._clock)
        tokens = preparer.target_tokens(command.options)
        sources, prefixes = [], []
        for index, text in enumerate(command.texts):
            sources.append(preparer.source_ids(text, f"texts[{index}]", direction, max_tokens=command.options.max_source_tokens))
            prefix = command.target_prefixes[index] if command.target_prefixes else ""
            prefixes.append(preparer.prefix_ids(prefix, f"target_prefixes[{index}]", command.options, len(sources[-1])))
            await turn.over()
        preparer.check_attention(command.options, zip(map(len, sources), map(len, prefixes), strict=True))
        self._check_time(command.deadline_s)

        plans = {
            index: preparer.plan(
                command.options, len(source), direction=direction, place=index, tokens=tokens, prefix=prefixes[index]
            )
            for index, source in enumerate(sources)
            if source
        }
        is_continued = False
        while asked := [(index, options) for index, plan in plans.items() for options in plan.wanted()]:
            outcomes = await self._decode(
                [(sources[index], options) for index, options in asked],
                arrived_at_s=self._clock() if is_continued else arrived_at_s,
                expires_at_s=command.deadline_s,
                continued=is_continued,
            )
            is_continued = True
            of_texts: dict[int, list[Outcome]] = {}
            for (index, _), outcome in zip(asked, outcomes, strict=True):
                of_texts.setdefault(index, []).append(outcome)
            for index, of_text in of_texts.items():
                plans[index].take(of_text)

        translations = []
        for index, source in enumerate(sources):
            if source:
                attended = preparer.attended(command.texts[index], command.options, direction)
                translations.append(preparer.translation(len(source), plans[index].outcome(), attended))
            else:
                translations.append(preparer.blank(command.options, prefixes[index]))
            await turn.over()
        return translations

    async def score(self, command: ScoreCommand) -> list[ScoredTarget]:
        """Score the target of every text of ``command``, answers in its order.

        When this is cancelled, or one fails, the engine is told to drop the others.

        Raises:
            InvalidRequestError: as ``translate``; or a target is no text of the model's target, or too long.
            OverloadedError, ShuttingDownError, DeadlineExceededError, EngineError: as ``translate``.
        """
        arrived_at_s = self._clock()
        preparer, scorer = self.preparer, TargetScorer(preparer=self.preparer)
        direction = preparer.direction(command.source_language, command.target_language)
        preparer.check_count(len(command.texts), RequestOptions())
        check_targets(len(command.texts), command.targets, command.target_tokens)
        self._check_room(command.texts)
        name = "target_tokens" if command.target_tokens else "targets"
        turn = _Turn(self._clock)
        # Of each text, the ids of its source and of its target.
        pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        num_tokens = 0
        for index, (text, target) in enumerate(zip(command.texts, command.target_tokens or command.targets, strict=True)):
            source_ids = preparer.source_ids(text, f"texts[{index}]", direction)
            pairs.append((source_ids, scorer.target_ids(target, f"{name}[{index}]", len(source_ids))))
            num_tokens += len(pairs[-1][1])
            check_size(num_tokens, name)
            await turn.over()
        self._check_time(command.deadline_s)

        asked = [(source_ids, scoring_options(target_ids, direction)) for source_ids, target_ids in pairs if source_ids]
        outcomes: list[Outcome] = []
        if asked:
            outcomes = await self._decode(asked, arrived_at_s=arrived_at_s, expires_at_s=command.deadline_s, continued=False)
        scored, in_turn = [], iter(outcomes)
        for source_ids, target_ids in pairs:
            scored.append(scorer.scored(target_ids, len(source_ids), next(in_turn)) if source_ids else ScoredTarget())
            await turn.over()
        return scored

    async def stream(self, command: StreamCommand) -> AsyncGenerator[StreamPiece, None]:
        """Translate one text, telling its text as soon as nothing can change it; the last piece carries the whole translation.

        Close the iterator (``contextlib.aclosing``) when leaving it early: that drops the sequence from the engine.

        Raises:
            InvalidRequestError: as ``translate``.
            OverloadedError, ShuttingDownError, DeadlineExceededError, EngineError: as ``translate``.
        """
        arrived_at_s = self._clock()
        preparer = self.preparer
        direction = preparer.direction(command.source_language, command.target_language)
        preparer.check_options(command.options)
        check_bias(command.options, is_prefixed=bool(command.target_prefix))
        check_streamed(command.options)
        source = preparer.source_ids(command.text, "text", direction, max_tokens=command.options.max_source_tokens)
        prefix = preparer.prefix_ids(command.target_prefix, "target_prefix", command.options, len(source))
        preparer.check_attention(command.options, [(len(source), len(prefix))])
        target_tokens = preparer.target_tokens(command.options)
        self._check_time(command.deadline_s)
        if not source:
            blank = preparer.blank(command.options, prefix)
            yield StreamPiece(text_delta=blank.hypotheses[0].text, translation=blank)
            return

        tokens = _Tokens()
        sequence = preparer.sequence(
            source,
            command.options,
            direction=direction,
            tokens=target_tokens,
            prefix=prefix,
            arrived_at_s=arrived_at_s,
            expires_at_s=command.deadline_s,
            on_outcome=lambda outcome: self._mailbox.post(partial(tokens.end, outcome)),
            on_token=lambda token: self._mailbox.post(partial(tokens.add, token)),
        )
        detokenizer = StreamingDetokenizer(preparer.tokenizer)
        self._engine.submit([sequence])
        try:
            while tokens.outcome is None:
                await tokens.news.wait()
                delta = detokenizer.push(tokens.take())
                if delta:
                    yield StreamPiece(text_delta=delta)
        finally:
            if tokens.outcome is None:
                self._engine.cancel([sequence])
        if tokens.outcome.error is not None:
            raise tokens.outcome.error
        rest = detokenizer.push(tokens.take()) + detokenizer.finish()
        attended = preparer.attended(command.text, command.options, direction)
        yield StreamPiece(text_delta=rest, translation=preparer.translation(len(source), tokens.outcome, attended))

    def _check_room(self, texts: Sequence_[str], sequences_per_text: int = 1) -> None:
        # Before the work of tokenizing: a refusal is cheap, or a storm of them would keep the loop from everybody else.
        wanted = sum(1 for text in texts if text and not text.isspace())
        if wanted:
            self._engine.check_room(wanted * sequences_per_text)

    def _check_time(self, deadline_s: float) -> None:
        if self._clock() >= deadline_s:
            raise DeadlineExceededError("the deadline passed before the request was admitted")

    def _deliver(self, answers: _Answers, index: int, outcome: Outcome) -> None:
        self._mailbox.post(partial(answers.add, index, outcome))

    async def _decode(
        self,
        asked: list[tuple[tuple[int, ...], DecodingOptions]],
        *,
        arrived_at_s: float,
        expires_at_s: float,
        continued: bool,
    ) -> list[Outcome]:
        """What comes of sources, each with its options, in their order; raises the first error, and drops the others then."""
        answers = _Answers(self._loop, len(asked))
        sequences = [
            Sequence(
                source_ids=source_ids,
                options=options,
                arrived_at_s=arrived_at_s,
                expires_at_s=expires_at_s,
                on_outcome=partial(self._deliver, answers, index),
            )
            for index, (source_ids, options) in enumerate(asked)
        ]
        self._engine.submit(sequences, continued=continued)
        try:
            await answers.complete
        finally:
            unfinished = [sequence for index, sequence in enumerate(sequences) if index not in answers.outcomes]
            if unfinished:
                self._engine.cancel(unfinished)
        return [answers.outcomes[index] for index in range(len(asked))]


class _Answers:
    """Outcomes of one request, gathered on the event loop: complete with the last one, or with the first error."""

    def __init__(self, loop: asyncio.AbstractEventLoop, count: int) -> None:
        self._count = count
        self.outcomes: dict[int, Outcome] = {}
        self.complete: asyncio.Future[None] = loop.create_future()

    def add(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        if self.complete.done():
            return
        if outcome.error is not None:
            self.complete.set_exception(outcome.error)
        elif len(self.outcomes) == self._count:
            self.complete.set_result(None)


class _Tokens:
    """Tokens of one stream that nobody has taken yet, and its outcome once it has ended. At most max_target_tokens of them."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self._tokens: list[int] = []
        self.news = asyncio.Event()

    def add(self, token: int) -> None:
        self._tokens.append(token)
        self.news.set()

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.news.set()

    def take(self) -> list[int]:
        self.news.clear()
        tokens, self._tokens = self._tokens, []
        return tokens


class _Turn:
    """Gives the event loop away once this task has held it for a slice of time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ends_at_s = clock() + _SLICE_S

    async def over(self) -> None:
        if self._clock() >= self._ends_at_s:
            await asyncio.sleep(0)
            self._ends_at_s = self._clock() + _SLICE_S
