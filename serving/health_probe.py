"""``python -m serving.health_probe``: is the server in this container ready?

For container health checks: asks the standard health service over loopback, once, and exits with 0 when the server serves and
with 1 in every other case. Knows nothing of translation; loads neither the engine nor a model.
"""

from __future__ import annotations

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.config import ServerConfig

# A proxy named in the environment is not for loopback.
_CHANNEL_OPTIONS = (("grpc.enable_http_proxy", 0),)


def fault(address: str, timeout_s: float) -> str | None:
    """Asks the server at ``address`` for its overall health.

    Args:
        address: ``host:port`` of the server's gRPC port.
        timeout_s: longest wait for the answer, connecting included.

    Returns:
        None when the server is SERVING, otherwise what was found instead, for a person.
    """
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return None if status == "SERVING" else status


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=ServerConfig().port,
    envvar="ONNXLATE_SERVE_PORT",  # the server's own
    show_default=True,
    help="The gRPC port.",
)
@click.option(
    "--timeout-s", type=click.FloatRange(0, min_open=True), default=3.0, show_default=True, help="Longest wait for the answer."
)
def main(port: int, timeout_s: float) -> None:
    """Exit with 0 when the server on this machine is ready to translate."""
    address = f"127.0.0.1:{port}"
    found = fault(address, timeout_s)
    if found is not None:
        raise click.ClickException(f"{address} is not ready: {found}")


if __name__ == "__main__":
    main()
