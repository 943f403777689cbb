"""What the engine tells whoever is watching.

Knows the events of the engine's life and their units; does not know Prometheus, gRPC or the engine.
"""

from __future__ import annotations

from typing import Protocol


class EngineObserver(Protocol):
    """Told what happens, on the engine's threads, up to once per decode step: a call has to take microseconds and not raise."""

    def queued(self, length: int) -> None:
        """The number of waiting sequences is now ``length``."""

    def encoded(self, seconds: float, sources: int, source_tokens: int) -> None:
        """One encoder batch ran: ``sources`` sources of together ``source_tokens`` tokens, padding not counted."""

    def stepped(self, seconds: float, rows: int) -> None:
        """One decoder step ran over ``rows`` rows."""

    def first_token(self, seconds_since_arrival: float) -> None:
        """A sequence has its first token."""

    def finished(self, reason: str, target_tokens: int, queue_seconds: float) -> None:
        """A sequence ended.

        Args:
            reason: one of ``FINISH_REASONS``.
            target_tokens: tokens decoded for its best hypothesis, the end-of-sentence token included; 0 without one.
            queue_seconds: from its arrival to the start of its encoder batch, or to its end when it was never encoded.
        """

    def rows_in_use(self, worker: int, rows: int) -> None:
        """Worker number ``worker`` holds ``rows`` cache rows."""

    def cache_bytes(self, worker: int, bytes: int) -> None:
        """Worker number ``worker`` has allocated ``bytes`` for its caches."""


# A sequence ends with its best hypothesis' finish reason, or with what stopped it.
FINISH_REASONS = ("eos", "length", "cancelled", "expired", "error")


class NullObserver:
    """Watches nothing."""

    def queued(self, length: int) -> None:
        """Ignored."""

    def encoded(self, seconds: float, sources: int, source_tokens: int) -> None:
        """Ignored."""

    def stepped(self, seconds: float, rows: int) -> None:
        """Ignored."""

    def first_token(self, seconds_since_arrival: float) -> None:
        """Ignored."""

    def finished(self, reason: str, target_tokens: int, queue_seconds: float) -> None:
        """Ignored."""

    def rows_in_use(self, worker: int, rows: int) -> None:
        """Ignored."""

    def cache_bytes(self, worker: int, bytes: int) -> None:
        """Ignored."""
