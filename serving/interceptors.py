"""What surrounds every handler: the one table from errors to status codes, decoding, request metrics, the in-flight count.

Knows gRPC, the error tree and the request metrics; does not know what a method does.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from serving.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelLoadingError,
    OverloadedError,
    RequestCancelledError,
    ShuttingDownError,
)
from serving.metrics import ServiceMetrics

logger = logging.getLogger(__name__)

# The domain of ErrorInfo details: whose reasons they are.
ERROR_DOMAIN = "onnxlate"
# At its deadline a client drops the call, which is heard of about when the server's own count of it ends.
_ABOUT_NOW_S = 0.05
# Another server may take the request at once, so a client should not wait long.
_RETRY_ELSEWHERE_S = 1.0

_CODES = {code.value[0]: code for code in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]

if TYPE_CHECKING:
    # Generic in the stubs alone.
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.aio.ServerInterceptor


def status_of(error: BaseException) -> status_pb2.Status:
    """The status that a client is told for ``error``: the single table.

    What is not in the table is INTERNAL with an opaque id; the error itself goes to the log under that id, because its text may
    hold paths or other people's data.
    """
    match error:
        case InvalidRequestError(field=field, reason=reason):
            violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=reason)
            return _status(code_pb2.INVALID_ARGUMENT, str(error), error_details_pb2.BadRequest(field_violations=[violation]))
        case OverloadedError(reason=reason, retry_after_s=retry_after_s):
            return _status(code_pb2.RESOURCE_EXHAUSTED, str(error), *_retry(reason, retry_after_s))
        case ShuttingDownError():
            return _status(code_pb2.UNAVAILABLE, "the server is shutting down", *_retry("shutting_down", _RETRY_ELSEWHERE_S))
        case ModelLoadingError():
            return _status(code_pb2.UNAVAILABLE, "the model is still loading", *_retry("loading", _RETRY_ELSEWHERE_S))
        case DeadlineExceededError():
            return _status(code_pb2.DEADLINE_EXCEEDED, "the deadline passed before the answer was ready")
        case RequestCancelledError():
            return _status(code_pb2.CANCELLED, "the request was cancelled")
        case _:
            error_id = uuid.uuid4().hex
            logger.error("error %s", error_id, exc_info=error)
            return _status(code_pb2.INTERNAL, f"internal error {error_id}")


def _retry(reason: str, retry_after_s: float) -> tuple[Message, Message]:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(retry_after_s * 1e9))
    return (
        error_details_pb2.RetryInfo(retry_delay=delay),
        error_details_pb2.ErrorInfo(reason=reason.upper(), domain=ERROR_DOMAIN),
    )


def _status(code: int, message: str, *details: Message) -> status_pb2.Status:
    packed = []
    for detail in details:
        any_detail = any_pb2.Any()
        any_detail.Pack(detail)
        packed.append(any_detail)
    return status_pb2.Status(code=code, message=message, details=packed)


def _rejection(error: Exception) -> str | None:
    match error:
        case OverloadedError(reason=reason):
            return reason
        case ShuttingDownError():
            return "shutting_down"
        case ModelLoadingError():
            return "loading"
        case _:
            return None


def _decode(deserializer: Callable[[bytes], Any], request: bytes) -> Any:
    try:
        return deserializer(request)
    except DecodeError as error:
        raise InvalidRequestError("request", "is not a message of this method: it is cut, or its text is not UTF-8") from error


async def _abort(context: Context, status: status_pb2.Status) -> NoReturn:
    full = rpc_status.to_status(status)
    await context.abort(full.code, full.details, full.trailing_metadata)


class RequestInterceptor(_ServerInterceptor):
    """Runs the handlers of the services named; the standard services (health, reflection) pass untouched.

    It takes requests as bytes and decodes them itself: gRPC answers UNKNOWN, before any handler, for bytes that its deserializer
    refuses (a cut message, text that is not UTF-8), where INVALID_ARGUMENT is right.
    """

    def __init__(self, services: Collection[str], metrics: ServiceMetrics, *, longest_s: float) -> None:
        """Intercept the methods of ``services``, full names as in the protocol.

        A call ends after ``longest_s`` seconds whatever it waits for, a client that does not read among others.
        """
        self._longest_s = longest_s
        self._services = frozenset(services)
        self._metrics = metrics
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        # Handlers as registered, and what was put around each, by method.
        self._wrapped: dict[str, tuple[Any, grpc.RpcMethodHandler[Any, Any]]] = {}

    @property
    def in_flight(self) -> int:
        """Requests whose status has not been sent."""
        return self._in_flight

    async def wait_idle(self) -> None:
        """Return once no request is in flight: every status has been sent."""
        await self._idle.wait()

    async def intercept_service(  # type: ignore[override]  # the stubs leave out that there may be no such method
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        known = self._wrapped.get(handler_call_details.method)
        if known is not None and known[0] is handler:
            return known[1]
        service, _, method = handler_call_details.method.lstrip("/").partition("/")
        if handler is None or service not in self._services:
            return handler
        assert not handler.request_streaming, "the services take one message a request"
        if handler.response_streaming:
            wrapped = grpc.unary_stream_rpc_method_handler(self._stream(handler, method))
        else:
            wrapped = grpc.unary_unary_rpc_method_handler(self._unary(handler, method))
        self._wrapped[handler_call_details.method] = handler, wrapped
        return wrapped

    def _unary(self, handler: Any, method: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def respond(request: bytes, context: Context) -> bytes:
            response = await handler.unary_unary(_decode(handler.request_deserializer, request), context)
            serialized: bytes = handler.response_serializer(response)
            return serialized

        async def unary(request: bytes, context: Context) -> bytes:
            response: bytes = await self._guarded(respond(request, context), method, context)
            return response

        return unary

    def _stream(self, handler: Any, method: str) -> Callable[[bytes, Context], Awaitable[None]]:
        async def respond(request: bytes, context: Context) -> None:
            # gRPC does not close a handler's generator when a call is cancelled between two messages; aclosing does, so that what
            # the generator holds in the engine is given back.
            async with aclosing(handler.unary_stream(_decode(handler.request_deserializer, request), context)) as responses:
                async for response in responses:
                    await context.write(handler.response_serializer(response))

        async def stream(request: bytes, context: Context) -> None:
            await self._guarded(respond(request, context), method, context)

        return stream

    async def _guarded(self, work: Awaitable[Any], method: str, context: Context) -> Any:
        """Awaits ``work``; turns what it raises into a status. Counted before the status is sent."""
        self._enter(context)
        self._metrics.request_started(method)
        started_at_s = time.monotonic()

        def ended(code: grpc.StatusCode) -> None:
            self._metrics.request_ended(method, code.name, time.monotonic() - started_at_s)

        try:
            async with asyncio.timeout(self._longest_s) as limit:
                response = await work
        except grpc.aio.BaseError:
            # gRPC's own: the call is over (its client has gone, the server stopped) and cannot be written to.
            ended(grpc.StatusCode.CANCELLED)
            raise
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # None without a deadline, whatever the stubs say.
                remaining_s: float | None = context.time_remaining()
                expired = remaining_s is not None and remaining_s < _ABOUT_NOW_S
                ended(grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED)
                raise
            # Nobody cancelled this call: something under it let a CancelledError out. Passed on, it would leave the client
            # hanging.
            status = status_of(error)
        except Exception as raised:
            failure = DeadlineExceededError(str(raised)) if limit.expired() else raised
            reason = _rejection(failure)
            if reason is not None:
                self._metrics.rejected(reason)
            status = status_of(failure)
        else:
            ended(grpc.StatusCode.OK)
            return response
        ended(_CODES[status.code])
        await _abort(context, status)

    def _enter(self, context: Context) -> None:
        self._in_flight += 1
        self._idle.clear()
        context.add_done_callback(self._leave)  # type: ignore[arg-type]  # the stubs want their own class; any callable does

    def _leave(self, ctx: Context) -> None:
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()
