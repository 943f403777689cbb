"""Many lines in, their translations out in the same order, with a bounded number of them on the way.

Knows lines and windows; does not know the command line, the event loop or how a translation is made. Errors name the line.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO, TypeVar

from serving.attended import AttendedSource
from serving.errors import InvalidRequestError, OnnxlateError
from serving.preparation import UNTOLD, Direction, TextPreparer, Translation
from serving.request import Outcome, Sequence
from serving.request_options import RequestOptions, check_bias, check_one_sequence
from serving.translator import DecodingEngine

_L = TypeVar("_L")
_T = TypeVar("_T")


# What of a line is in each of a request's fields.
_OF_LINES = {"texts": "", "target_prefixes": "target prefix of ", "targets": "target of "}


def read_lines(stream: BinaryIO, called: str = "line") -> Iterator[str]:
    """Lines of UTF-8 text without their ends. Only a line feed (after a carriage return or not) ends a line.

    Raises:
        InvalidRequestError: a line is not UTF-8; names it, as ``called`` and its number.
    """
    for number, raw in enumerate(stream, start=1):
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidRequestError(f"{called} {number}", f"is not UTF-8 (its byte {error.start + 1})") from error


def with_prefixes(lines: Iterable[str], target_prefixes: Iterable[str] | None) -> Iterator[tuple[str, str]]:
    """Each line and what its translation starts with; None: nothing.

    Raises:
        InvalidRequestError: there are fewer prefixes than lines, or more. Lines before are still there.
    """
    prefixes = None if target_prefixes is None else iter(target_prefixes)
    number = 0
    for number, line in enumerate(lines, start=1):
        prefix = "" if prefixes is None else next(prefixes, None)
        if prefix is None:
            raise InvalidRequestError(f"line {number}", f"has no target prefix: there are {number - 1}")
        yield line, prefix
    if prefixes is not None and next(prefixes, None) is not None:
        raise InvalidRequestError("target prefixes", f"must be as many as lines, {number}, not more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """How much is handed to an engine ahead of the oldest line that is not answered; within what its queue holds."""

    max_sequences: int
    max_source_tokens: int


def through_engine(
    lines: Iterable[str],
    *,
    preparer: TextPreparer,
    engine: DecodingEngine,
    options: RequestOptions,
    window: Window,
    direction: Direction = UNTOLD,
    target_prefixes: Iterable[str] | None = None,
) -> Iterator[Translation]:
    """Translate lines in this process. Lines before a bad one are still answered, then its error is raised.

    Args:
        lines: read only as fast as the window moves.
        preparer: the model's rules.
        engine: started; it is never handed more than the window, so it has no cause to refuse.
        options: of every line.
        window: at most this much is in the engine.
        direction: what the model is told of the lines' languages.
        target_prefixes: one for each line, what its translation starts with; an empty one leaves it free.

    Raises:
        InvalidRequestError: the options, a line or its prefix are out of bounds.
        EngineError: a graph failed.
    """
    preparer.check_options(options)
    check_one_sequence(options)
    check_bias(options, is_prefixed=target_prefixes is not None)
    target_tokens = preparer.target_tokens(options)
    on_the_way: deque[_Line] = deque()
    tokens = 0

    def is_full(source_tokens: int) -> bool:
        return len(on_the_way) >= window.max_sequences or tokens + source_tokens > window.max_source_tokens

    failure: OnnxlateError | None = None
    numbered = enumerate(with_prefixes(lines, target_prefixes), start=1)
    try:
        while True:
            try:
                number, (text, target_prefix) = next(numbered)
                source = preparer.source_ids(text, f"line {number}", direction, max_tokens=options.max_source_tokens)
                prefix = preparer.prefix_ids(target_prefix, f"target prefix of line {number}", options, len(source))
            except StopIteration:
                break
            except OnnxlateError as error:
                failure = error
                break
            while on_the_way and (is_full(len(source)) or on_the_way[0].ended.is_set()):
                tokens -= len(on_the_way[0].source)
                yield on_the_way.popleft().translation(preparer, options)
            line = _Line(source, prefix)
            if source:
                line.attended = preparer.attended(text, options, direction)
                now_s = time.monotonic()
                line.sequence = preparer.sequence(
                    source,
                    options,
                    direction=direction,
                    place=number - 1,
                    tokens=target_tokens,
                    prefix=prefix,
                    arrived_at_s=now_s,
                    expires_at_s=math.inf,
                    on_outcome=line.end,
                )
                engine.submit([line.sequence])
            else:
                line.ended.set()
            tokens += len(source)
            on_the_way.append(line)
        while on_the_way:
            yield on_the_way.popleft().translation(preparer, options)
    finally:
        left = [line.sequence for line in on_the_way if line.sequence is not None and not line.ended.is_set()]
        if left:
            engine.cancel(left)
    if failure is not None:
        raise failure


@dataclass(slots=True)
class _Line:
    source: tuple[int, ...]
    prefix: tuple[int, ...]
    attended: AttendedSource | None = None
    sequence: Sequence | None = None
    outcome: Outcome | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ended.set()

    def translation(self, preparer: TextPreparer, options: RequestOptions) -> Translation:
        self.ended.wait()
        if self.outcome is None:
            return preparer.blank(options, self.prefix)
        if self.outcome.error is not None:
            raise self.outcome.error
        return preparer.translation(len(self.source), self.outcome, self.attended)


def through_server(
    lines: Iterable[_L], translate: Callable[[list[_L]], list[_T]], *, lines_per_request: int, requests_in_flight: int
) -> Iterator[_T]:
    """Translate lines, or score them, by requests of several lines each.

    Lines before a bad request are still answered, then its error is raised.

    Args:
        lines: whatever ``translate`` takes for lines; read only as fast as requests are answered.
        translate: sends one request; called on several threads.
        lines_per_request: of each request but the last.
        requests_in_flight: at most so many at once.

    Raises:
        InvalidRequestError: a line is out of bounds or cannot be read.
        OnnxlateError: what ``translate`` raises.
    """
    failure: OnnxlateError | None = None
    on_the_way: deque[tuple[int, Future[list[_T]]]] = deque()
    numbered = enumerate(lines, start=1)
    pool = ThreadPoolExecutor(requests_in_flight, thread_name_prefix="onnxlate-request")
    try:
        while failure is None:
            batch: list[tuple[int, _L]] = []
            try:
                for line in itertools.islice(numbered, lines_per_request):
                    batch.append(line)  # one by one: lines before a bad one are kept
            except OnnxlateError as error:
                failure = error
            if not batch:
                break
            if len(on_the_way) >= requests_in_flight:
                yield from _answer(*on_the_way.popleft())
            on_the_way.append((batch[0][0], pool.submit(translate, [text for _, text in batch])))
        while on_the_way:
            yield from _answer(*on_the_way.popleft())
    finally:
        # Without waiting: whoever leaves early closes the client, which ends the calls in flight.
        pool.shutdown(wait=False, cancel_futures=True)
    if failure is not None:
        raise failure


def _answer(first_number: int, future: Future[list[_T]]) -> list[_T]:
    """The request's answers; its error names the line instead of the place within the request."""
    try:
        return future.result()
    except InvalidRequestError as error:
        place = re.fullmatch(rf"({'|'.join(_OF_LINES)})\[(\d+)\]", error.field)
        if place is None:
            raise
        raise InvalidRequestError(f"{_OF_LINES[place[1]]}line {first_number + int(place[2])}", error.reason) from error
