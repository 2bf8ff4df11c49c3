"""Whether a gRPC service says of itself that it can answer (grpc.health.v1)."""

from __future__ import annotations

from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf.errors import TransientError
from rlhf.serving.client import call_sync, connect_sync

PROBE_TIMEOUT_S = 0.5


def is_serving(address: str, service: str, *, tls_ca: Path | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """False: not listening yet, still loading, draining, or silent for `timeout_s`. Health asks for no token."""
    with connect_sync(address, tls_ca=tls_ca) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # gRPC sets it on the instance
        try:
            answer = call_sync(check, health_pb2.HealthCheckRequest(service=service), timeout_s=timeout_s)
        except TransientError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
