"""What rounds need of others: a trainer that can be held, a group that waits for both, reports, refusals."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.arguments import parse
from rlhf.cli.main import BY_HAND, DEMO
from rlhf.cli.records import StageRecord
from rlhf.errors import ModelError, SettingsError, StageFailed
from rlhf.evaluate import rounds as shown
from rlhf.evaluate.report import render
from rlhf.models.folders import write_json
from rlhf.observe.rounds import read_rounds
from rlhf.observe.waits import waits
from rlhf.ppo import loop as trainer
from rlhf.queues.connection import connect
from rlhf.queues.deliveries import QueueCounts, QueueDepth
from rlhf.queues.registry import Beat, open_registry
from rlhf.rounds import loop
from rlhf.rounds.plan import Planned
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings
from rlhf.supervisor import pipeline
from rlhf.supervisor.group import group
from rlhf.supervisor.process import Process
from rlhf.supervisor.settings import RunSettings
from rlhf.supervisor.signals import Signals
from rlhf.supervisor.supervisor import Supervisor
from support.answering import AnsweringWorker
from support.runs import wait_until
from support.tiny import tiny_lm_folder, tiny_reward_folder

PAUSE = "the reward rose by 1.00, but the judges prefer the old policy"
AUDIT = {"pairs": 40, "win_rate": 0.6, "win_rate_interval": [0.45, 0.75], "over_optimised": False}
ROUND = {
    "round": 1,
    "policy_step": 13,
    "judgments": 264,
    "chosen_by": "bald",
    "accuracy_in_service": 0.536,
    "accuracy_new": 0.628,
    "accuracy_gain": 0.092,
    "accuracy_gain_interval": [0.011, 0.178],
    "promoted": True,
    "audit": {**AUDIT, "reward_gain": 1.05, "reward_gain_interval": [0.66, 1.41]},
    "seconds": 40.0,
}
CLOSING = {
    "round": 2,
    "policy_step": 40,
    "judgments": 40,
    "audit": {"pairs": 0, "over_optimised": False},
    "seconds": 1.0,
}


@pytest.fixture
def settings(tmp_path: Path, run_name: str, redis_settings: Any) -> Settings:
    made = Settings.model_validate(
        {
            "run": {"name": run_name, "folder": tmp_path},
            "redis": redis_settings.model_dump(),
            "ppo": {"steps": 4, "batch_prompts": 2, "epochs": 1, "rollout_timeout_s": 20.0, "threads": 1},
            "sampling": {"max_new_tokens": 8},
        }
    )
    tiny_lm_folder(made.paths.pretrained)
    tiny_reward_folder(made.paths.reward_model)
    made.paths.prompts.parent.mkdir(parents=True)
    made.paths.prompts.write_text('{"prompt": "A fine"}\n')
    return made


def test_a_held_trainer_makes_no_step_until_a_person_lets_it_go_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.setattr(trainer, "PAUSED_POLL_S", 0.02)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the trainer is in a thread here
    registry = open_registry(connect(settings), settings.run.name, settings.redis)
    registry.pause("audit", PAUSE)
    registry.pause("rounds", "round 2 of feedback is judged first")
    assert registry.paused() == {"audit": PAUSE, "rounds": "round 2 of feedback is judged first"}
    worker = AnsweringWorker(connect(settings), settings.run.name, settings.redis, lambda task: None)
    worker.start()
    running = threading.Thread(target=trainer.run, args=(settings,))
    running.start()
    try:
        wait_until(lambda: f"paused: {PAUSE}; round 2" in caplog.text, "the pause", 30)
        assert registry.resume("rounds")
        wait_until(lambda: caplog.text.rstrip().endswith(f"paused: {PAUSE}"), "one pause to be lifted", 10)
        time.sleep(0.5)
        assert not settings.paths.metrics.exists() or not settings.paths.metrics.read_text()
        doing = lambda: next(beat.fields["doing"] for beat in registry.beats() if beat.service == "ppo")  # noqa: E731
        wait_until(lambda: doing() == f"paused: {PAUSE}", "the report of it", 10)
        loop.resume(settings)
        assert f"lifted: {PAUSE}" in capsys.readouterr().out
        running.join(30)
        assert not running.is_alive()
    finally:
        registry.resume("audit")
        worker.stop()
    assert len(settings.paths.metrics.read_text().splitlines()) == 4
    loop.resume(settings)
    assert "nothing holds" in capsys.readouterr().out


def test_rounds_do_not_wait_for_a_trainer_that_is_not_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY_S", 0.05)
    run = settings.run.model_copy(update={"start_timeout_s": 0.3})
    redis = settings.redis.model_copy(update={"lease_s": 1.0})
    registry = open_registry(connect(settings), settings.run.name, redis)
    one = loop.Loop(settings.model_copy(update={"run": run, "redis": redis}))
    beating = threading.Event()

    def beat() -> None:
        while not beating.wait(0.05):
            registry.beat("ppo", "trainer-0", {})

    trainer_thread = threading.Thread(target=beat)
    began_s = time.monotonic()
    trainer_thread.start()
    threading.Timer(1.0, beating.set).start()
    with pytest.raises(StageFailed, match=r"round 1 waits for step 2 of PPO, and no trainer has reported for 0\.3 s"):
        one._wait_for(Planned(1, 2, [], []))
    trainer_thread.join()
    # A trainer that reports is waited for.
    assert time.monotonic() - began_s > 1.0


def test_rounds_wait_for_a_step_only_so_long_but_for_a_person_as_long_as_it_takes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY_S", 0.05)
    feedback = settings.feedback.model_copy(update={"step_timeout_s": 0.3})
    registry = open_registry(connect(settings), settings.run.name, settings.redis)
    one = loop.Loop(settings.model_copy(update={"feedback": feedback}))
    registry.beat("ppo", "trainer-0", {})
    registry.pause("audit", PAUSE)
    began_s = time.monotonic()
    threading.Timer(0.6, registry.resume, ["audit"]).start()
    with pytest.raises(StageFailed, match=r"step 2 of PPO, and the trainer has published nothing for 0\.3 s"):
        one._wait_for(Planned(1, 2, [], []))
    assert time.monotonic() - began_s > 0.9


def test_status_says_who_is_paused_and_what_the_rounds_do() -> None:
    nothing = QueueDepth(0, 0, 0, 0.0, 0, QueueCounts(added=0, acknowledged=0, dead=0, lost=0))
    beats = [
        Beat("ppo", "trainer-0", {"doing": f"paused: {PAUSE}"}, 0.1),
        Beat("rounds", "rounds", {"doing": "round 1: 12 of 36 answers"}, 0.1),
    ]
    said = waits(beats, nothing, [])
    assert said[:2] == [f"the trainer is paused: {PAUSE}", "feedback: round 1: 12 of 36 answers"]


def test_the_supervisor_waits_for_both(tmp_path: Path) -> None:
    def child(name: str, seconds: float) -> Process:
        return Process(
            name, ["/bin/sh", "-c", f"sleep {seconds}; echo {name} >> {tmp_path / 'ended'}"], tmp_path / name
        )

    with Signals() as signals, Supervisor(RunSettings(start_timeout_s=20.0), signals) as supervisor:
        for name, seconds in (("service", 30.0), ("ppo", 0.2), ("rounds", 0.8)):
            supervisor.start(child(name, seconds))
        supervisor.run_until_done("ppo", "rounds")
    assert (tmp_path / "ended").read_text().split() == ["ppo", "rounds"], "who is done is not started again"


def names(settings: Settings, **options: bool) -> list[str]:
    return [child.name for child in group(settings, **options)]


def test_rounds_are_one_process_more_and_people_a_page() -> None:
    plain = names(load_settings())
    assert "rounds" not in plain
    one = load_settings(overrides=["feedback.rounds=1"])
    assert set(names(one)) - set(plain) == {"rounds"}
    assert names(one)[-1] == "ppo"
    by_hand = load_settings(overrides=["feedback.rounds=1", "feedback.people=true"])
    assert set(names(by_hand)) - set(plain) == {"rounds", "annotate"}
    assert "ppo" not in names(by_hand, trainer=False)


def test_the_reward_service_follows_only_where_rounds_are_made() -> None:
    for rounds, expected in ((0, False), (1, True)):
        reward = next(
            child for child in group(load_settings(overrides=[f"feedback.rounds={rounds}"])) if child.name == "reward"
        )
        assert any("reward.follow=" in part for part in reward._command) is expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_trainer_is_done_goes_on_with_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    chosen = [f"run.folder={tmp_path}", 'run.stages=["ppo"]', "feedback.rounds=1"]
    settings, asked = load_settings(overrides=chosen), []
    verb = pipeline.BY_NAME["ppo"]
    decided = pipeline.stage_settings(verb, settings)
    StageRecord("ppo", 1.0, time.time(), decided, {"steps": 1}).write(settings.paths.stages)
    if finished:
        write_json(settings.paths.rounds_finished, {})

    def rounds_alone(given: Settings, *, trainer: bool) -> list[Process]:
        asked.append(trainer)
        return [Process("rounds", ["/bin/true"], tmp_path / "rounds.log")]

    monkeypatch.setattr(pipeline, "group", rounds_alone)
    pipeline.run(settings)
    assert asked == ([] if finished else [False])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["feedback.rounds=1", "reward.rule=a:b"], "feedback.rounds refreshes a reward model, and reward.rule is none"),
        (["feedback.rounds=1", "run.deterministic=true"], "run.deterministic needs"),
        (["feedback.random_share=1"], "feedback.random_share"),
        (["feedback.completions=10"], "feedback.completions"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(overrides=overrides)
    assert sentence in str(raised.value)


def test_deterministic_runs_make_no_rounds() -> None:
    enough = ["policy.threads=1", "reward.threads=1", "reference.threads=1", "ppo.threads=1", "run.deterministic=true"]
    with pytest.raises(SettingsError, match=r"feedback\.rounds to be 0: when a refreshed reward model comes is chance"):
        load_settings(overrides=[*enough, "feedback.rounds=1"])


def test_rounds_need_something_to_do_and_a_model_with_its_reference_set(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"feedback\.rounds is 0"):
        loop.run(load_settings())
    model = tiny_reward_folder(tmp_path / "foreign")
    (model / "reference_set.jsonl").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=r"has no reference_set\.jsonl"):
        loop.run(load_settings(overrides=["feedback.rounds=1", f"reward.model={model}"]))


def test_the_demo_by_hand_is_small_and_asks_people() -> None:
    assert parse(["demo", "--annotate"]).annotate
    assert not parse(["demo"]).annotate
    demo, by_hand = (load_settings(files=files) for files in ([DEMO], [DEMO, BY_HAND]))
    assert (demo.feedback.rounds, demo.feedback.people) == (1, False)
    assert (by_hand.feedback.rounds, by_hand.feedback.people) == (1, True)
    assert by_hand.feedback.prompts + by_hand.feedback.audit_pairs <= 40
    for name in ("pretrain", "sample", "rank", "reward-model"):
        verb = pipeline.BY_NAME[name]
        assert pipeline.stage_settings(verb, demo) == pipeline.stage_settings(verb, by_hand), "steps 1 and 2 are kept"


def test_rounds_are_in_the_report_and_the_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = load_settings(overrides=[f"run.folder={tmp_path}", 'run.stages=["ppo"]', "feedback.rounds=1"])
    for one in ({"round": 0}, CLOSING, ROUND):
        write_json(settings.paths.rounds / str(one["round"]) / "round.json", one)
    write_json(settings.paths.rounds_finished, {})
    decided = pipeline.stage_settings(pipeline.BY_NAME["ppo"], settings)
    StageRecord("ppo", 1.0, time.time(), decided, {"steps": 1}).write(settings.paths.stages)
    found = read_rounds(settings.paths)
    assert [one["round"] for one in found] == [1, 2]
    html = render(settings)
    assert "Rounds of feedback" in html
    assert "[0.011, 0.178]" in html
    assert "0.60 [0.45, 0.75]" in html
    assert "Blind audits" in html
    assert shown.audits([CLOSING]) is None
    pipeline.run(settings)
    said = capsys.readouterr().out
    assert "rounds of feedback" in said
    assert "0.60 [0.45, 0.75]" in said
    assert "rlhf demo --annotate" in said


def test_a_run_without_rounds_says_nothing_of_them(tmp_path: Path) -> None:
    settings = load_settings(overrides=[f"run.folder={tmp_path}"])
    StageRecord("ppo", 1.0, time.time(), {}, {"steps": 1}).write(settings.paths.stages)
    assert read_rounds(settings.paths) == []
    assert "Rounds of feedback" not in render(settings)
