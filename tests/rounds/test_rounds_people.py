"""A run of real processes whose round is judged by a person in a browser without JavaScript."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import httpx
import pytest

from rlhf.feedback.judgments import read_judgments
from support.annotating import PASSWORD
from support.annotation_client import log_in, replies, submit_form
from support.feedback_runs import figures, rounds_of_feedback
from support.runs import wait_until


class Output(threading.Thread):
    """What a process says, as it says it."""

    def __init__(self, running: Any) -> None:
        super().__init__(daemon=True)
        self.text, self._running = "", running
        self.start()

    def run(self) -> None:
        for line in self._running.stdout:
            self.text += line

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        wait_until(lambda: re.search(pattern, self.text), f"{pattern} in {self.text[-2000:]}", timeout_s)
        found = re.search(pattern, self.text)
        assert found is not None
        return found[1]


def answer_everything(client: httpx.Client) -> int:
    """Likes the longer reply; how many answers."""
    answers = 0
    while 'action="/answer"' in (page := client.get("/")).text:
        lengths = [len(reply) for reply in replies(page)]
        if 'name="preference"' in page.text:
            fields = {"preference": "1" if lengths[1] > lengths[0] else "-1"}
        else:
            order = sorted(lengths, reverse=True)
            fields = {f"rank-{place}": str(order.index(length) + 1) for place, length in enumerate(lengths)}
        done = submit_form(client, page, "/answer", fields)
        assert done.status_code == 200, done.text
        answers += 1
    return answers


@pytest.mark.timeout(240)
def test_ppo_waits_for_a_person_and_goes_on(tmp_path: Any) -> None:
    sections = {"ppo": {"steps": 6}, "annotate": {"port": 0, "submits_per_minute": 1000}}
    own = {"rounds": 1, "people": True, "prompts": 6, "audit_pairs": 3, "promote_margin": 1.0}
    run = rounds_of_feedback(tmp_path, sections, **own)
    running = run.start()
    output = Output(running)
    try:
        link = output.wait_for(r"(http://127\S+/join/\S+)", 150)
        with httpx.Client(base_url=link.split("/join/")[0], follow_redirects=True, timeout=30) as client:
            page = client.get(link)
            action = next((a for a in re.findall(r'<form[^>]*action="([^"]*)"', page.text) if "join" in a), "")
            joined = submit_form(client, page, action, {"name": "ada", "password": PASSWORD}, url=link)
            assert joined.status_code == 200, joined.text
            assert log_in(client, "ada").status_code == 200
            wait_until(lambda: "paused: round 1 of feedback: 0 of" in output.text, "the wait for people", 120)
            held = run.steps()
            assert held < 6
            time.sleep(1.0)
            assert run.steps() == held
            assert answer_everything(client) >= 6
            # The finished policy is audited too, while nothing waits any more.
            wait_until(
                lambda: 'action="/answer"' in client.get("/").text or running.poll() is not None, "the last audit", 120
            )
            answer_everything(client)
        assert running.wait(60) == 0, output.text
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
    judgments = read_judgments(run.paths.rounds / "1" / "judgments.jsonl")
    assert {one.annotator for one in judgments} != {"simulated-0"}
    assert all(one.guideline_version and one.created_at for one in judgments)
    one = figures(run, 1)
    assert one["promoted"]
    assert one["annotators"] == 1
    assert run.steps() == 6
    assert figures(run, 2)["audit"]["pairs"] == 3
