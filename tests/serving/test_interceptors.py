from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from prometheus_client import CollectorRegistry

from serving.errors import (
    BundleError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    ModelLoadingError,
    OverloadedError,
    RequestCancelledError,
    ShuttingDownError,
)
from serving.interceptors import RequestInterceptor, status_of
from serving.metrics import ServiceMetrics
from serving.pb import translation_pb2 as pb
from tests.fakes import PATIENCE_S

SERVICE = "test.Service"
Behaviour = Callable[[pb.TranslateRequest, Any], Awaitable[Any]]


def details_of(status: Any, *kinds: Any) -> list[Any]:
    """The details of a status, each of its kind."""
    found = []
    for packed, kind in zip(status.details, kinds, strict=True):
        detail = kind()
        assert packed.Unpack(detail), packed.type_url
        found.append(detail)
    return found


# The table.


def test_an_invalid_request_names_its_field() -> None:
    status = status_of(InvalidRequestError("options.beam_size", "must be from 1 to 5, not 9"))
    assert (status.code, status.message) == (3, "options.beam_size: must be from 1 to 5, not 9")
    (bad,) = details_of(status, error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("options.beam_size", "must be from 1 to 5, not 9")]


@pytest.mark.parametrize(
    ("error", "code", "reason", "retry_s"),
    [
        pytest.param(OverloadedError("queue_full", 1.5), 8, "QUEUE_FULL", 1.5, id="overloaded"),
        pytest.param(ShuttingDownError("engine closed"), 14, "SHUTTING_DOWN", 1.0, id="shutting down"),
        pytest.param(ModelLoadingError("loading"), 14, "LOADING", 1.0, id="loading"),
    ],
)
def test_what_may_be_tried_again_says_when(error: Exception, code: int, reason: str, retry_s: float) -> None:
    status = status_of(error)
    assert status.code == code
    retry, info = details_of(status, error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo)
    assert retry.retry_delay.ToNanoseconds() == retry_s * 1e9
    assert (info.reason, info.domain) == (reason, "onnxlate")


@pytest.mark.parametrize(
    ("error", "code"),
    [(DeadlineExceededError("late"), 4), (RequestCancelledError("gone"), 1)],
    ids=["deadline", "cancelled"],
)
def test_what_is_over_says_so(error: Exception, code: int) -> None:
    status = status_of(error)
    assert (status.code, list(status.details)) == (code, [])


@pytest.mark.parametrize(
    "error",
    [ValueError("/secret/path"), EngineError("/secret/path"), BundleError("/secret/path", ["a fault"])],
    ids=["unknown", "engine", "bundle"],
)
def test_everything_else_is_opaque_and_in_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    status = status_of(error)
    assert status.code == 13
    assert "secret" not in status.message
    error_id = status.message.removeprefix("internal error ")
    assert len(error_id) == 32
    (record,) = caplog.records
    assert error_id in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_two_internal_errors_have_two_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    assert status_of(ValueError("a")).message != status_of(ValueError("a")).message


# Around a handler, over a socket.


@asynccontextmanager
async def service(
    unary: Behaviour, registry: CollectorRegistry | None = None
) -> AsyncIterator[tuple[grpc.aio.Channel, RequestInterceptor]]:
    """A service of one unary method, ``Unary``, and one that streams what the handler returns, ``Stream``."""

    async def stream(request: pb.TranslateRequest, context: Any) -> AsyncIterator[pb.TranslateResponse]:
        yield pb.TranslateResponse()
        yield await unary(request, context)

    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(
            unary,
            request_deserializer=pb.TranslateRequest.FromString,
            response_serializer=pb.TranslateResponse.SerializeToString,
        ),
        "Stream": grpc.unary_stream_rpc_method_handler(
            stream,
            request_deserializer=pb.TranslateRequest.FromString,
            response_serializer=pb.TranslateResponse.SerializeToString,
        ),
    }
    interceptor = RequestInterceptor([SERVICE], ServiceMetrics(registry or CollectorRegistry()), longest_s=PATIENCE_S)
    server = grpc.aio.server(interceptors=[interceptor])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel, interceptor
    finally:
        await server.stop(None)


def unary_call(channel: grpc.aio.Channel, method: str = "Unary") -> Any:
    return channel.unary_unary(f"/{SERVICE}/{method}", None, pb.TranslateResponse.FromString)


def stream_call(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream(f"/{SERVICE}/Stream", None, pb.TranslateResponse.FromString)


def requests(registry: CollectorRegistry, method: str, code: str) -> float | None:
    return registry.get_sample_value("onnxlate_requests_total", {"method": method, "code": code})


async def fine(request: pb.TranslateRequest, context: Any) -> pb.TranslateResponse:
    return pb.TranslateResponse(timings=pb.RequestTimings(total_seconds=len(request.texts)))


def failing(error: BaseException) -> Behaviour:
    async def fail(request: pb.TranslateRequest, context: Any) -> pb.TranslateResponse:
        raise error

    return fail


async def test_messages_pass_and_are_counted() -> None:
    registry = CollectorRegistry()
    message = pb.TranslateRequest(texts=["a", "b"]).SerializeToString()
    async with service(fine, registry) as (channel, interceptor):
        assert (await unary_call(channel)(message)).timings.total_seconds == 2
        assert [response.timings.total_seconds async for response in stream_call(channel)(message)] == [0, 2]
        await asyncio.wait_for(interceptor.wait_idle(), PATIENCE_S)
    assert (requests(registry, "Unary", "OK"), requests(registry, "Stream", "OK")) == (1, 1)
    assert registry.get_sample_value("onnxlate_requests_in_flight", {"method": "Unary"}) == 0
    assert registry.get_sample_value("onnxlate_request_seconds_count", {"method": "Unary"}) == 1


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(pb.TranslateRequest(texts=["abcdef"]).SerializeToString()[:-2], id="cut"),
        pytest.param(b"\x0a\x02\xff\xfe", id="not UTF-8"),
        pytest.param(b"\xff\xff\xff\xff", id="noise"),
    ],
)
async def test_bytes_that_are_no_message_are_an_invalid_argument(message: bytes) -> None:
    registry = CollectorRegistry()
    async with service(fine, registry) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError, match="is not a message of this method") as raised:
            await unary_call(channel)(message)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(aiter(stream_call(channel)(message)))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert requests(registry, "Unary", "INVALID_ARGUMENT") == 1


async def test_an_error_reaches_the_client_as_the_table_has_it() -> None:
    registry = CollectorRegistry()
    async with service(failing(OverloadedError("queue_full", 2.0)), registry) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary_call(channel)(b"")
        call: Any = raised.value
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(call)
        retry, _ = details_of(status, error_details_pb2.RetryInfo, error_details_pb2.ErrorInfo)
        assert retry.retry_delay.ToNanoseconds() == 2_000_000_000
    assert requests(registry, "Unary", "RESOURCE_EXHAUSTED") == 1
    assert registry.get_sample_value("onnxlate_rejections_total", {"reason": "queue_full"}) == 1


async def test_a_stream_that_fails_in_the_middle_says_why() -> None:
    registry = CollectorRegistry()
    async with service(failing(ShuttingDownError("bye")), registry) as (channel, _):
        stream = aiter(stream_call(channel)(b""))
        await anext(stream)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await anext(stream)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    assert requests(registry, "Stream", "UNAVAILABLE") == 1
    assert registry.get_sample_value("onnxlate_rejections_total", {"reason": "shutting_down"}) == 1


async def test_an_unknown_error_is_opaque_to_the_client(caplog: pytest.LogCaptureFixture) -> None:
    async with service(failing(RuntimeError("the password is 1234"))) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError, match=r"internal error [0-9a-f]{32}") as raised:
            await unary_call(channel)(b"")
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert "1234" not in str(raised.value)
    assert "the password is 1234" in caplog.text


async def test_a_stray_cancelled_error_does_not_leave_the_client_hanging(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    async with service(failing(asyncio.CancelledError()), registry) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError, match="internal error") as raised:
            await unary_call(channel)(b"", timeout=PATIENCE_S)
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    assert requests(registry, "Unary", "INTERNAL") == 1


async def test_a_response_that_cannot_be_written_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    async def wrong(request: pb.TranslateRequest, context: Any) -> str:
        return "no message"

    async with service(wrong) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary_call(channel)(b"")
    assert raised.value.code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize("make_call", [unary_call, stream_call], ids=["unary", "stream"])
async def test_a_client_that_leaves_cancels_its_handler(make_call: Callable[[grpc.aio.Channel], Any]) -> None:
    registry = CollectorRegistry()
    entered, left = asyncio.Event(), asyncio.Event()

    async def wait_for_ever(request: pb.TranslateRequest, context: Any) -> pb.TranslateResponse:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        raise AssertionError("nothing sets it")

    async with service(wait_for_ever, registry) as (channel, interceptor):
        call = make_call(channel)(b"")
        await asyncio.wait_for(entered.wait(), PATIENCE_S)
        assert interceptor.in_flight == 1
        call.cancel()
        await asyncio.wait_for(left.wait(), PATIENCE_S)
        await asyncio.wait_for(interceptor.wait_idle(), PATIENCE_S)
    method = "Unary" if make_call is unary_call else "Stream"
    assert requests(registry, method, "CANCELLED") == 1
    assert registry.get_sample_value("onnxlate_requests_in_flight", {"method": method}) == 0


async def test_a_generator_is_closed_when_its_client_leaves_between_two_messages() -> None:
    closed = asyncio.Event()

    async def endless(request: pb.TranslateRequest, context: Any) -> AsyncIterator[pb.TranslateResponse]:
        try:
            while True:
                # Larger than the window of a connection: the write waits for a client that does not read.
                yield pb.TranslateResponse(translations=[pb.TranslatedText(hypotheses=[pb.Hypothesis(text="x" * 1_000_000)])])
        finally:
            closed.set()

    handlers = {
        "Stream": grpc.unary_stream_rpc_method_handler(
            endless,
            request_deserializer=pb.TranslateRequest.FromString,
            response_serializer=pb.TranslateResponse.SerializeToString,
        )
    }
    interceptor = RequestInterceptor([SERVICE], ServiceMetrics(CollectorRegistry()), longest_s=PATIENCE_S)
    server = grpc.aio.server(interceptors=[interceptor])
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = stream_call(channel)(b"")
        await anext(aiter(call))
        call.cancel()
        await asyncio.wait_for(closed.wait(), PATIENCE_S)
    await asyncio.wait_for(interceptor.wait_idle(), PATIENCE_S)
    await server.stop(None)


async def test_a_deadline_that_passes_is_counted_as_such() -> None:
    registry = CollectorRegistry()
    left = asyncio.Event()

    async def wait_for_ever(request: pb.TranslateRequest, context: Any) -> pb.TranslateResponse:
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        raise AssertionError("nothing sets it")

    async with service(wait_for_ever, registry) as (channel, interceptor):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary_call(channel)(b"", timeout=0.1)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(left.wait(), PATIENCE_S)
        await asyncio.wait_for(interceptor.wait_idle(), PATIENCE_S)
    assert requests(registry, "Unary", "DEADLINE_EXCEEDED") == 1


async def test_methods_nobody_knows_are_unimplemented_and_not_counted() -> None:
    registry = CollectorRegistry()
    async with service(fine, registry) as (channel, _):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unary_call(channel, "Made/Up/By/A/Client")(b"")
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not [s for family in registry.collect() if family.name == "onnxlate_requests" for s in family.samples]


async def test_a_handler_is_wrapped_once_and_another_of_that_name_anew() -> None:
    details: Any = SimpleNamespace(method=f"/{SERVICE}/Unary")

    async def answer(request: pb.TranslateRequest, context: Any) -> pb.TranslateResponse:
        return pb.TranslateResponse()

    first, second = grpc.unary_unary_rpc_method_handler(answer), grpc.unary_unary_rpc_method_handler(answer)
    interceptor = RequestInterceptor([SERVICE], ServiceMetrics(CollectorRegistry()), longest_s=1.0)

    async def wrapped(handler: Any) -> Any:
        async def find(details: Any) -> Any:
            return handler

        return await interceptor.intercept_service(find, details)

    once = await wrapped(first)
    assert once is not first
    assert await wrapped(first) is once
    assert await wrapped(second) is not once
    assert await wrapped(None) is None


async def test_other_services_pass_untouched() -> None:
    interceptor = RequestInterceptor([SERVICE], ServiceMetrics(CollectorRegistry()), longest_s=PATIENCE_S)
    handler: Any = grpc.unary_unary_rpc_method_handler(fine)

    async def continuation(details: Any) -> Any:
        return handler

    class Details:
        method = "/grpc.health.v1.Health/Check"

    assert await interceptor.intercept_service(continuation, Details()) is handler  # type: ignore[arg-type]  # what it reads of them
