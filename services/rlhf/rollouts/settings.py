"""Settings of the rollout worker."""

from __future__ import annotations

from pathlib import Path

from pydantic import PositiveFloat, PositiveInt

from rlhf.settings import InstanceName, Section


class RolloutsSettings(Section):
    policy: str = "127.0.0.1:7101"
    """Address of the policy service; several, separated by commas, or a DNS name with several addresses, are used in
    turn."""
    reward: str = "127.0.0.1:7102"
    """Address of the reward service."""
    reference: str = "127.0.0.1:7103"
    """Address of the reference service."""
    token_file: Path | None = None
    """File with the token that the services ask for."""
    tls_ca: Path | None = None
    """PEM file with the authority that signed the services' certificates; set: connections use TLS."""
    consumer: InstanceName = "worker-0"
    """Stable name of this worker in the consumer group; a restarted worker takes up what it had. Given empty: the
    machine's host name."""
    prompts_in_flight: PositiveInt = 64
    """Prompts being worked on at once."""
    prompts_per_call: PositiveInt = 8
    """Prompts that share one Generate, one Score and one LogProbs, where that many are in the stream together; fewer
    where each has many completions."""
    generate_timeout_s: PositiveFloat = 120.0
    """Deadline of one Generate, its wait in the policy's queue included."""
    score_timeout_s: PositiveFloat = 60.0
    """Deadline of one Score or LogProbs."""
    unavailable_timeout_s: PositiveFloat = 120.0
    """A prompt is kept this long, and tried again, while a service is away; then it counts as failed."""
    full_timeout_s: PositiveFloat = 3600.0
    """The worker waits this long on a full rollouts stream before it gives up."""
    grace_s: PositiveFloat = 5.0
    """Seconds that prompts in hand have to be finished after SIGTERM; what is not stays pending for the next start."""
