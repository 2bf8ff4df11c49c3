"""The deployment of docker/compose.yaml on a real engine: a run that trains, is scaled, loses every part once, and ends
with every rollout accounted for, while nobody restarts anything by hand. `make test-docker`, some minutes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.serving.client import call_sync, connect_sync
from rlhf.v1 import policy_pb2, policy_pb2_grpc
from support.deployment import Deployment, engine_trouble

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

BATCH = 32
"""`ppo.batch_prompts`."""
RECOVERY_S = 240.0
"""Training goes on within this time, whatever has happened."""


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    if trouble := engine_trouble():
        pytest.skip(trouble)
    it = Deployment(Path(__file__).parent / "settings.toml", run="proof")
    try:
        it.compose("--progress", "quiet", "build", timeout_s=1500)
        it.say("images are built")
        yield it
    finally:
        it.remove()


def test_a_run_in_containers_survives_the_loss_of_every_part(deployment: Deployment, tmp_path: Path) -> None:
    with deployment.explained():
        start(deployment)
        scale_up(deployment, tmp_path)
        scale_down(deployment)
        for service in ("policy", "rollouts", "redis", "ppo"):
            kill_one(deployment, service)
        pause_a_policy(deployment)
        cut_off_a_policy(deployment)
        last = stop_and_start_again(deployment)
        finish(deployment, last)
        start_what_is_finished(deployment)
        report(deployment)


def start(it: Deployment) -> None:
    it.up()
    it.say("up, from empty volumes")
    goes_on(it, "the first steps")


def goes_on(it: Deployment, after: str, steps: int = 3) -> None:
    """Training makes some more steps."""
    before = it.steps()
    took_s = it.wait_until(lambda: it.steps() >= before + steps, f"{steps} steps after {after}", RECOVERY_S)
    it.say(f"{after}: step {it.steps()}, {steps} more took {took_s:.0f} s")


def scale_up(it: Deployment, folder: Path) -> None:
    it.up("--scale", "policy=3", "--scale", "rollouts=3")
    assert (len(it.containers("policy")), len(it.containers("rollouts"))) == (3, 3)
    newest = it.containers("policy")[-1]
    (folder / "token").write_text(it.token())
    took_s = it.wait_until(lambda: sequences(it, newest, folder / "token"), f"work for {newest}", 90)
    it.say(f"scaled up; {newest} had work after {took_s:.0f} s")
    goes_on(it, "scaling up")


def sequences(it: Deployment, container: str, token: Path) -> int:
    """How many a policy replica decodes just now, asked from the host at its published port, with the token."""
    with connect_sync(it.published(container, 7101), token_file=token) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)
        counts = []
        for _ in range(10):
            counts.append(int(call_sync(stub.Info, policy_pb2.PolicyInfoRequest(), timeout_s=5).running))
            time.sleep(0.05)
    return max(counts)


def scale_down(it: Deployment) -> None:
    it.up("--scale", "policy=2", "--scale", "rollouts=1")
    assert (len(it.containers("policy")), len(it.containers("rollouts"))) == (2, 1)
    goes_on(it, "scaling down")


def kill_one(it: Deployment, service: str) -> None:
    victim = it.containers(service)[0]
    it.kill(victim, service)
    it.wait_until(lambda: it.restarts(victim) == 1, f"a restart of {victim}", RECOVERY_S)
    goes_on(it, f"killing {service}")
    it.wait_until(lambda: it.healthy(victim), f"health of {victim}", RECOVERY_S)


def pause_a_policy(it: Deployment) -> None:
    """It answers nothing, and its connections stay open: only keepalive tells."""
    frozen = it.containers("policy")[0]
    it.docker("pause", frozen)
    try:
        goes_on(it, "pausing a policy", steps=8)
    finally:
        it.docker("unpause", frozen)
    it.wait_until(lambda: it.healthy(frozen), f"health of {frozen}", RECOVERY_S)


def cut_off_a_policy(it: Deployment) -> None:
    lost, network = it.containers("policy")[1], f"{it.project}_inside"
    it.docker("network", "disconnect", network, lost)
    goes_on(it, "cutting off a policy", steps=8)
    it.docker("network", "connect", "--alias", "policy", network, lost)
    goes_on(it, "its return")


def stop_and_start_again(it: Deployment) -> int:
    """The volumes keep everything; containers, and so the workers' names, are new. Whatever the machine's pace, the
    faults are over now, and so may the run be soon: a setting from the environment."""
    last = it.steps() + 20
    it.compose("--progress", "quiet", "down", timeout_s=120)
    it.environment["RLHF_PPO_STEPS"] = str(last)
    it.up()
    assert it.steps() > last - 30, "the run began anew"
    it.say("down and up")
    return last


def finish(it: Deployment, last: int) -> None:
    done = "training is done"
    it.wait_until(lambda: done in it.compose("logs", "ppo"), "the end of training", 300)
    assert it.steps() == last
    audit = it.rlhf("ppo", "audit")
    assert f"clean: {last * BATCH} trained" in audit
    it.say(f"finished; {audit.splitlines()[-1]}")


def start_what_is_finished(it: Deployment) -> None:
    last = it.steps()
    it.up("--force-recreate")
    assert it.steps() == last
    it.say("up again, with nothing left to do")


def report(it: Deployment) -> None:
    for verb in ("evaluate", "report"):
        it.compose("run", "--rm", "--no-deps", "prepare", verb, "--config", "/etc/rlhf/settings.toml", timeout_s=180)
    assert "<html" in it.compose("exec", "-T", "ppo", "cat", f"{it.folder}/report.html")
    it.say("the report is written")
