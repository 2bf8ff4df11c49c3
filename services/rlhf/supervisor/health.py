"""Whether a gRPC service says of itself that it can answer (grpc.health.v1).

    python -m rlhf.supervisor.health 127.0.0.1:7101 rlhf.v1.PolicyService

ends with 0 if it does, and with 1 if not: the health check of a container. It imports grpc and no settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from rlhf.errors import TransientError
from rlhf.serving.client import call_sync, connect_sync

PROBE_TIMEOUT_S = 0.5
COMMAND_TIMEOUT_S = 3.0
"""As a command nobody waits for it, and the machine may be busy."""


def is_serving(address: str, service: str, *, tls_ca: Path | None = None, timeout_s: float = PROBE_TIMEOUT_S) -> bool:
    """False: not listening yet, still loading, draining, or silent for `timeout_s`. Health asks for no token."""
    with connect_sync(address, tls_ca=tls_ca) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]  # gRPC sets it on the instance
        try:
            answer = call_sync(check, health_pb2.HealthCheckRequest(service=service), timeout_s=timeout_s)
        except TransientError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    where, name = sys.argv[1:]
    sys.exit(0 if is_serving(where, name, timeout_s=COMMAND_TIMEOUT_S) else f"{name} at {where} is not serving")
