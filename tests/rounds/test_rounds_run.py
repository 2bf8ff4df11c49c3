"""A run of real processes in which simulated annotators judge while PPO goes on, and the reward model is exchanged."""

import json
import os
import signal

import pytest

from rlhf.data.rows import read_rows
from rlhf.feedback.judgments import read_judgments
from rlhf.models.ensemble import reward_sha256
from rlhf.ppo.history import History
from support.feedback_runs import figures, rounds_of_feedback
from support.runs import wait_until


def finish(running):
    output, _ = running.communicate(timeout=150)
    assert running.returncode == 0, output
    return output


@pytest.mark.timeout(240)
def test_a_killed_round_goes_on_and_exchanges_the_reward_model(tmp_path):
    # Whatever comes out is promoted, so that the exchange is seen; PPO waits, so that it is not done before.
    run = rounds_of_feedback(tmp_path, rounds=1, promote_margin=1.0, hold=True)
    running = run.start()
    try:
        # In the middle of the round: what is done stays done.
        wait_until(lambda: (run.paths.rounds / "1" / "questions.jsonl").exists(), "the first question", 120)
        os.kill(run.processes()["rounds"]["pid"], signal.SIGKILL)
        output = finish(running)
    finally:
        running.kill()
    one = figures(run, 1)
    assert one["promoted"], one
    assert one["chosen_by"] == "bald", one
    assert 0 < one["policy_step"] < 20
    assert one["heldout"] == 4
    folder = run.paths.rounds / "1"
    judgments = read_judgments(folder / "judgments.jsonl")
    assert len({each.judgment_id for each in judgments}) == len(judgments) == one["judgments"]
    assert {each.source for each in judgments} == {"random", "active", "audit"}
    assert all(each.p_select and 0 < each.p_select <= 1 for each in judgments if each.source != "audit")
    asked = [row.fields["task"]["task_id"] for row in read_rows(folder / "questions.jsonl")]
    assert {each.task_id for each in judgments} == set(asked)
    first, refreshed = reward_sha256(run.paths.reward_model), reward_sha256(folder / "reward-model")
    history = History(run.paths.history)
    scored_by = [{rollout.reward_sha256 for rollout in history.read(step).rollouts} for step in range(1, 21)]
    assert scored_by[0] == {first}
    assert scored_by[-1] == {refreshed}, output
    assert one["model_sha256"] == refreshed
    facts = [
        json.loads((path / "reward_model.json").read_text())
        for path in (run.paths.reward_model, folder / "reward-model")
    ]
    assert facts[0]["reference_set_sha256"] == facts[1]["reference_set_sha256"]
    assert figures(run, 2)["audit"]["pairs"] == 6
    assert "rounds died" in (run.paths.logs / "run.log").read_text()
    assert "paused: round 1 of feedback is judged first" in (run.paths.logs / "ppo.log").read_text()
