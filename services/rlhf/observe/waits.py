"""What waits for what, derived from the reports of trainer, workers and policies."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.queues.deliveries import QueueDepth
from rlhf.queues.registry import Beat, Replica


def waits(beats: Sequence[Beat], prompts: QueueDepth, replicas: Sequence[Replica]) -> list[str]:
    """A few sentences, the trainer's first: "the trainer waits for 12 of 64 rollouts", "worker-0 has 52 in hand: …"."""
    trainers = [beat for beat in beats if beat.service == "ppo"]
    workers = [beat for beat in beats if beat.service == "rollouts"]
    rounds = [f"feedback: {beat.fields['doing']}" for beat in beats if beat.service == "rounds"]
    return [*_trainer(trainers), *rounds, *_workers(workers, prompts, trainers), *_policies(replicas, workers)]


def _trainer(trainers: Sequence[Beat]) -> list[str]:
    if not trainers:
        return ["no trainer reports: nothing asks for rollouts"]
    fields = trainers[0].fields
    if fields["doing"] != "waiting for rollouts":
        return [f"the trainer is {fields['doing']}"]
    missing = fields["rollouts_needed"] - fields["rollouts_ready"]
    return [f"the trainer waits for {missing} of {fields['rollouts_needed']} rollouts"]


def _workers(workers: Sequence[Beat], prompts: QueueDepth, trainers: Sequence[Beat]) -> list[str]:
    if not workers:
        waiting = f", and {prompts.entries} prompts wait for one" if prompts.entries else ""
        return [f"no rollout worker reports{waiting}"]
    sentences = []
    for worker in workers:
        stages = ", ".join(f"{count} {stage}" for stage, count in sorted(worker.fields["stages"].items()))
        if worker.fields["in_hand"]:
            sentences.append(f"{worker.name} has {worker.fields['in_hand']} prompts in hand: {stages}")
        else:
            for_what = "prompts from the trainer" if trainers else "prompts, which no trainer sends"
            sentences.append(f"{worker.name} waits for {for_what}")
    return sentences


def _policies(replicas: Sequence[Replica], workers: Sequence[Beat]) -> list[str]:
    if any(replica.ready for replica in replicas):
        return []
    generating = sum(worker.fields["stages"].get("generating", 0) for worker in workers)
    asked = f": {generating} prompts wait for one" if generating else ""
    return [f"no policy is ready{asked}"]
