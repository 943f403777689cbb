"""Stand-ins at the boundaries: a scripted engine, a byte tokenizer, a clock that is driven by hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequence_

import numpy as np
from numpy.typing import NDArray

from serving.errors import RequestCancelledError, ShuttingDownError
from serving.model import ServedModel
from serving.preparation import ModelDescription, TextPreparer
from serving.request import FinishReason, Hypothesis, Outcome, Sequence, SequenceTimings
from serving.request_options import TranslationLimits

EOS_ID, UNKNOWN_ID = 1, 2
_FIRST_BYTE_ID = 10
# Waiting that long for something that has to happen is a failure.
PATIENCE_S = 20.0


class ByteTokenizer:
    """A token for each byte of UTF-8. Targets have no zero bytes."""

    def encode(self, text: str) -> list[int]:
        return [_FIRST_BYTE_ID + byte for byte in text.encode()]

    @property
    def unknown_target_id(self) -> int | None:
        return UNKNOWN_ID

    def encode_target(self, text: str) -> list[int] | None:
        return None if "\0" in text else self.encode(text)

    def target_forms(self, text: str) -> list[list[int]]:
        return [ids for one in (text, f" {text}") if (ids := self.encode_target(one)) is not None]

    def target_id(self, token: str) -> int | None:
        return _FIRST_BYTE_ID + ord(token) if len(token) == 1 and token.isascii() else None

    def decode(self, ids: Sequence_[int]) -> str:
        return bytes(id_ - _FIRST_BYTE_ID for id_ in ids if id_ >= _FIRST_BYTE_ID).decode(errors="replace")

    def decode_with(self, ids: Sequence_[int], instead: Mapping[int, str]) -> str:
        return "".join(instead.get(place) or self.decode([id_]) for place, id_ in enumerate(ids))

    def source_pieces(self, text: str) -> list[str]:
        return self.target_pieces(self.encode(text))

    def target_pieces(self, ids: Sequence_[int]) -> list[str]:
        return [chr(id_ - _FIRST_BYTE_ID) if id_ >= _FIRST_BYTE_ID else f"<{id_}>" for id_ in ids]

    def certain_text(self, ids: Sequence_[int]) -> str:
        return self.decode(ids).rstrip("\ufffd")


class FakeClock:
    """Monotonic seconds, moved by hand."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def shouted(sequence: Sequence) -> Outcome:
    """A translation: the source in capitals. Each further hypothesis has one more exclamation mark, and a score lower by 1.

    Each token attends to the source's token in the same place, and a little to the first. A target that is given is kept.
    """
    if sequence.options.given_target:
        return scored(sequence)
    text = ByteTokenizer().decode(sequence.source_ids).upper()
    longest = sequence.options.max_target_tokens
    hypotheses = []
    for rank in range(sequence.options.num_hypotheses):
        ids = ByteTokenizer().encode(text + "!" * rank)
        is_cut = len(ids) + 1 > longest
        hypotheses.append(
            Hypothesis(
                target_ids=tuple(ids[:longest]),
                score=-0.5 - rank if sequence.options.return_scores else None,
                finish_reason=FinishReason.LENGTH if is_cut else FinishReason.EOS,
                target_tokens=longest if is_cut else len(ids) + 1,
                token_scores=tuple(-0.25 * (i + 1) for i in range(longest if is_cut else len(ids) + 1))
                if sequence.options.return_token_scores
                else None,
                attention=diagonal(len(ids[:longest]), len(sequence.source_ids)) if sequence.options.return_attention else None,
            )
        )
    timings = SequenceTimings(queue_s=0.25, encode_s=0.5, decode_s=1.0, steps=7, mean_rows_per_step=3.5)
    return Outcome(hypotheses=tuple(hypotheses), timings=timings)


def scored(sequence: Sequence) -> Outcome:
    """Of a target that is given: -0.25 for its first token, -0.5 for the second, and so on."""
    *ids, _ = sequence.options.given_target
    token_scores = tuple(-0.25 * (i + 1) for i in range(len(ids) + 1))
    hypothesis = Hypothesis(
        target_ids=tuple(ids),
        score=sum(token_scores),
        finish_reason=FinishReason.EOS,
        target_tokens=len(token_scores),
        token_scores=token_scores,
    )
    timings = SequenceTimings(queue_s=0.25, encode_s=0.5, decode_s=1.0, steps=len(token_scores), mean_rows_per_step=3.5)
    return Outcome(hypotheses=(hypothesis,), timings=timings)


def diagonal(target_tokens: int, source_tokens: int) -> NDArray[np.float32]:
    """Attention to the token in the same place, or the last, and a little to the first: [target_tokens, source_tokens]."""
    attention = np.zeros((target_tokens, source_tokens), np.float32)
    attention[np.arange(target_tokens), np.minimum(np.arange(target_tokens), source_tokens - 1)] = 0.75
    attention[:, 0] += 0.25
    return attention


Script = Callable[[Sequence], Outcome | None]


def hold(sequence: Sequence) -> None:
    """A script that leaves the sequence to the test: ``ScriptedEngine.emit`` and ``end``."""


class ScriptedEngine:
    """Answers what its script says, on a thread of its own as the real one does; a script's None leaves the sequence running."""

    def __init__(self, script: Script = shouted) -> None:
        self.script = script
        # Raised by the next submissions.
        self.refusal: Exception | None = None
        self.submitted: list[Sequence] = []
        self.running: list[Sequence] = []
        self.most_running = 0
        self.started = self.draining = self.closed = False
        self._changed = threading.Condition()
        self._deliveries: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._deliver, daemon=True)

    def start(self) -> None:
        self.started = True
        self._thread.start()

    def check_room(self, num_sequences: int) -> None:
        with self._changed:
            if self.refusal is not None:
                raise self.refusal
            if self.draining:
                raise ShuttingDownError("the server is shutting down")

    def submit(self, sequences: Sequence_[Sequence], *, continued: bool = False) -> None:
        if not continued:
            self.check_room(len(sequences))
        with self._changed:
            self.submitted.extend(sequences)
            self.running.extend(sequences)
            self.most_running = max(self.most_running, len(self.running))
            self._changed.notify_all()
        for sequence in sequences:
            self._deliveries.put(lambda sequence=sequence: self._play(sequence))  # type: ignore[misc]  # a bound default

    def cancel(self, sequences: Sequence_[Sequence]) -> None:
        for sequence in sequences:
            sequence.cancelled = True
            self.end(sequence, Outcome(error=RequestCancelledError("the request was cancelled")))

    def drain(self) -> None:
        with self._changed:
            self.draining = True
            self._changed.notify_all()

    def close(self) -> None:
        self.closed = True
        for sequence in list(self.running):
            self.end(sequence, Outcome(error=ShuttingDownError("the server is shutting down")))
        if self.started:
            self._deliveries.put(None)
            self._thread.join(PATIENCE_S)

    # For tests.

    def emit(self, sequence: Sequence, text: bytes) -> None:
        """Tokens of ``text`` come out of a step each."""
        assert sequence.on_token is not None
        for byte in text:
            self._deliveries.put(lambda token=_FIRST_BYTE_ID + byte: sequence.on_token(token))  # type: ignore[misc]  # likewise

    def end(self, sequence: Sequence, outcome: Outcome | None = None) -> None:
        """The sequence is over; by default as ``shouted`` has it."""
        ended = shouted(sequence) if outcome is None else outcome
        self._deliveries.put(lambda: self._end(sequence, ended))

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of this engine."""
        with self._changed:
            assert self._changed.wait_for(holds, PATIENCE_S)

    def wait_running(self, count: int) -> list[Sequence]:
        """Wait until so many sequences are running."""
        self.wait_for(lambda: len(self.running) == count)
        return list(self.running)

    def _deliver(self) -> None:
        while (delivery := self._deliveries.get()) is not None:
            delivery()

    def _play(self, sequence: Sequence) -> None:
        outcome = self.script(sequence)
        if outcome is None:
            return
        if sequence.on_token is not None and outcome.hypotheses:
            for token in outcome.hypotheses[0].target_ids:
                sequence.on_token(token)
        self._end(sequence, outcome)

    def _end(self, sequence: Sequence, outcome: Outcome) -> None:
        with self._changed:
            if sequence not in self.running:
                return
            self.running.remove(sequence)
            self._changed.notify_all()
        sequence.on_outcome(outcome)


def fake_limits(
    *,
    max_texts_per_request: int = 4,
    max_source_tokens: int = 32,
    max_target_tokens: int = 64,
    max_beam_size: int = 5,
    max_request_s: float = 60.0,
) -> TranslationLimits:
    return TranslationLimits(
        max_texts_per_request=max_texts_per_request,
        max_source_tokens=max_source_tokens,
        max_target_tokens=max_target_tokens,
        max_beam_size=max_beam_size,
        max_request_s=max_request_s,
    )


def fake_preparer(limits: TranslationLimits | None = None) -> TextPreparer:
    return TextPreparer(
        tokenizer=ByteTokenizer(),
        eos_id=EOS_ID,
        languages=(("en", "de"), ("en", "fr"), ("de", "en")),
        limits=limits or fake_limits(),
    )


def fake_model(engine: ScriptedEngine, limits: TranslationLimits | None = None) -> ServedModel:
    """A model around ``engine``, which is started."""
    engine.start()
    return ServedModel(
        engine=engine,
        preparer=fake_preparer(limits),
        description=ModelDescription(name="shout", version="0123abcd", server_version="1.2.3", precision="fp32", device="cpu"),
        worker_rows=(16, 16),
    )
