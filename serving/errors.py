"""Every error that onnxlate raises on purpose.

OnnxlateError
├── InvalidRequestError      the caller's input; names the field
├── OverloadedError          no room now; says when to come back
├── DeadlineExceededError    the request's time is over
├── RequestCancelledError    the caller has gone
├── ShuttingDownError        draining; another server may take it
├── ModelLoadingError        the port is open, the model is not there yet
├── RemoteError              a client's: the call failed in a way that has no class of its own
├── EngineError              a graph failed; the request's fault or not, it cannot be answered
├── BundleError              a bundle that cannot be served; lists every fault
├── CheckpointError          a checkpoint that cannot be read; lists every fault
├── ExportError              an export that must not be used, or could not be written
└── ServerStartError         a port that is taken, a device that is not there

``interceptors.py`` has the one table from these to gRPC status codes.
"""

from __future__ import annotations

from collections.abc import Sequence


class OnnxlateError(Exception):
    """Base of the tree above."""


class InvalidRequestError(OnnxlateError):
    """Input out of bounds.

    Attributes:
        field: path of the field, as the protocol spells it, for example ``options.beam_size`` or ``texts[3]``.
        reason: what is wrong with it, for a person.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class OverloadedError(OnnxlateError):
    """The request was not admitted.

    Attributes:
        reason: bounded label for metrics, for example ``queue_full``.
        retry_after_s: when trying again is sensible.
    """

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(f"overloaded ({reason}); retry in {retry_after_s:.2f} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceededError(OnnxlateError):
    """The deadline passed before the answer was ready."""


class RequestCancelledError(OnnxlateError):
    """The caller cancelled."""


class ShuttingDownError(OnnxlateError):
    """The engine no longer admits requests."""


class ModelLoadingError(OnnxlateError):
    """The port is open, but the model is not there yet."""


class RemoteError(OnnxlateError):
    """A call failed in a way that has no class of its own, for example because no server answers.

    Attributes:
        code: name of the gRPC status code, for example ``UNAVAILABLE``.
    """

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code


class EngineError(OnnxlateError):
    """Running a graph failed."""


class _FaultsError(OnnxlateError):
    """An error about a directory, with all of its faults at once."""

    what = "directory"

    def __init__(self, path: object, faults: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{self.what} {path} cannot be used:", *faults]))
        self.faults = tuple(faults)


class BundleError(_FaultsError):
    """A bundle is incomplete, altered, or of another revision."""

    what = "bundle"


class CheckpointError(_FaultsError):
    """A checkpoint is incomplete or does not fit its configuration."""

    what = "checkpoint"


class ExportError(OnnxlateError):
    """The exported graphs are not close enough to the model, or could not be written."""


class ServerStartError(OnnxlateError):
    """The server cannot start."""
