"""A failed call, as its client sees it: the way back from status codes and details to errors.

The other side of the table in ``interceptors.py``. Knows gRPC statuses; does not know requests, channels or retries' timing.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from serving.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OnnxlateError,
    OverloadedError,
    RemoteError,
    RequestCancelledError,
    ShuttingDownError,
)

_T = TypeVar("_T")


def call_of(error: grpc.RpcError) -> grpc.Call:
    """What gRPC raises on the client's side is the call as well; its types do not say so."""
    return cast(grpc.Call, error)


def _detail(call: grpc.Call, kind: type[_T]) -> _T | None:
    """The detail of this kind that the server sent with its status."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details that belong to another status, as a proxy may leave them
        return None
    for packed in status.details if status is not None else ():
        detail: Any = kind()
        if packed.Unpack(detail):
            return cast(_T, detail)
    return None


def server_wait_s(call: grpc.Call) -> float:
    """Seconds that the server asks to wait; infinite when trying again is of no use."""
    retry = _detail(call, error_details_pb2.RetryInfo)
    if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and retry is None:
        return math.inf  # gRPC's own: a message that is too large stays so
    if call.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        return math.inf
    return float(retry.retry_delay.ToNanoseconds() / 1e9) if retry is not None else 0.0


def error_of(call: grpc.Call) -> OnnxlateError:
    """The error of the tree in ``errors.py`` that the server's status stands for, or RemoteError."""
    code, details = call.code(), call.details() or ""
    info = _detail(call, error_details_pb2.ErrorInfo)
    reason = info.reason.lower() if info is not None else ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        bad = _detail(call, error_details_pb2.BadRequest)
        if bad is not None and bad.field_violations:
            return InvalidRequestError(bad.field_violations[0].field, bad.field_violations[0].description)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and reason:
        return OverloadedError(reason, server_wait_s(call))
    if code is grpc.StatusCode.UNAVAILABLE and reason == "shutting_down":
        return ShuttingDownError(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError(details)
    if code is grpc.StatusCode.CANCELLED:
        return RequestCancelledError(details)
    return RemoteError(code.name, details)
