"""Each process of a run killed once, in the middle: the run finishes, and every rollout is accounted for."""

import json
import os
import signal

import pytest

from support.runs import Run, is_alive, wait_until

KILLED = ("policy-0", "reward", "reference", "worker-0", "redis", "ppo")


@pytest.mark.timeout(280)
def test_a_run_survives_the_kill_of_every_process(tmp_path):
    run = Run(tmp_path, sections={"ppo": {"steps": 70}})
    running = run.start()
    try:
        kill_one_after_another(run, running)
        output, _ = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 0, output
    log = (run.paths.logs / "run.log").read_text()
    assert all(f"{name} died" in log for name in KILLED)

    audit = run.rlhf("audit", "--config", str(run.config))
    output, _ = audit.communicate(timeout=60)
    assert audit.returncode == 0, output
    assert "clean: 560 trained" in output
    steps = [json.loads(line)["step"] for line in run.paths.metrics.read_text().splitlines()]
    assert steps == list(range(1, 71))


def kill_one_after_another(run, running):
    for name in KILLED:
        before = run.steps()
        wait_until(
            lambda name=name, before=before: (
                running.poll() is not None
                or (run.steps() >= before + 2 and run.processes().get(name, {}).get("state") == "ready")
            ),
            f"two more steps before killing {name}",
            90,
        )
        assert running.poll() is None, running.communicate()[0]
        os.kill(run.processes()[name]["pid"], signal.SIGKILL)


@pytest.mark.timeout(120)
def test_ctrl_c_stops_everything_within_seconds_and_a_second_start_goes_on(tmp_path):
    run = Run(tmp_path, sections={"ppo": {"steps": 40}})
    running = run.start()
    wait_until(lambda: run.steps() >= 2 or running.poll() is not None, "two steps", 60)
    pids = [process["pid"] for process in run.processes().values()]
    assert len(pids) == 6, running.communicate()[0]
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=15)
    assert running.returncode == 130, output
    assert not [pid for pid in pids if is_alive(pid)]

    done = run.steps()
    again = run.start()
    output, _ = again.communicate(timeout=90)
    assert again.returncode == 0, output
    assert done <= run.steps() == 40
