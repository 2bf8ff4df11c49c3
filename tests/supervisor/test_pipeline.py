"""Runs of fake stages: each a real process that goes through the real command, with a stand-in for its module."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.records import StageRecord
from rlhf.cli.verbs import BY_NAME
from rlhf.errors import SettingsError, StageFailed
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings
from rlhf.supervisor import group as group_module
from rlhf.supervisor import pipeline
from rlhf.supervisor.embedded_redis import EmbeddedRedis, Server
from rlhf.supervisor.group import RedisChild, child_environment, group, redis_at_hand
from rlhf.supervisor.outputs import clear_all, outputs
from rlhf.supervisor.process import Process

STAND_IN = """
import json, sys, types
from pathlib import Path
from rlhf.cli.main import main
from rlhf.cli.verbs import BY_NAME

verb, settings, log = sys.argv[1:4]

def run(settings):
    with open(log, "a") as file:
        print(verb, file=file)
    if verb == "sample" and settings.sample.limit == 13:
        raise SystemExit(9)
    folder = settings.paths.pretrained
    if verb == "pretrain":
        folder.mkdir(exist_ok=True)
        (folder / "steps").write_text(str(settings.pretrain.steps))
    return {"lm_perplexity": 7.0, "lm_perplexity_before": 700.0, "other": 1}

stand_in = types.ModuleType("stand_in")
stand_in.run = run
sys.modules[BY_NAME[verb].module] = stand_in
sys.exit(main([verb, "--config", settings]))
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Names of the stages that have run since the last call."""
    log = tmp_path / "ran"

    def stage_process(verb: str, settings: Settings) -> Process:
        command = [sys.executable, "-c", STAND_IN, verb, str(settings.paths.settings), str(log)]
        return Process(verb, command, settings.paths.logs / f"{verb}.log", environment=child_environment(os.environ))

    monkeypatch.setattr(pipeline, "stage_process", stage_process)

    def names() -> list[str]:
        found = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return names


def settings_of(folder: Path, *overrides: str) -> Settings:
    stages = 'run.stages=["world", "pretrain", "sample"]'
    return load_settings(overrides=[f"run.folder={folder / 'runs'}", "run.name=one", stages, *overrides])


def test_a_run_does_its_stages_once(
    tmp_path: Path, ran: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(tmp_path)
    pipeline.run(settings)
    assert ran() == ["world", "pretrain", "sample"]
    summary = json.loads(settings.paths.summary.read_text())
    assert summary["lm_perplexity"] == 7.0
    assert set(summary["seconds"]) == {"world", "pretrain", "sample", "total"}
    assert "other" not in summary
    assert load_settings(files=[settings.paths.settings]) == settings

    capsys.readouterr()
    pipeline.run(settings)
    assert ran() == []
    out = capsys.readouterr().out
    assert "[2/3] pretrain: done before, 0 s" in out
    assert "perplexity 700.0 7.0" in " ".join(out.split())
    assert json.loads(settings.paths.processes.read_text()) == []


def test_changed_settings_repeat_their_stage_on_a_clean_place_and_what_follows(
    tmp_path: Path, ran: Callable[[], list[str]]
) -> None:
    pipeline.run(settings_of(tmp_path))
    pretrained = settings_of(tmp_path).paths.pretrained
    (pretrained / "left-over").touch()
    ran()
    pipeline.run(settings_of(tmp_path, "pretrain.steps=5"))
    assert ran() == ["pretrain", "sample"]
    assert [path.name for path in pretrained.iterdir()] == ["steps"]
    assert (pretrained / "steps").read_text() == "5"


def test_what_a_stage_does_not_depend_on_repeats_nothing(tmp_path: Path, ran: Callable[[], list[str]]) -> None:
    pipeline.run(settings_of(tmp_path))
    ran()
    pipeline.run(settings_of(tmp_path, "policy.port=7777", "run.stop_timeout_s=3", "evaluate.limit=3"))
    assert ran() == []
    pipeline.run(settings_of(tmp_path, "sampling.temperature=0.5"))
    assert ran() == ["sample"]


def test_a_stage_repeated_by_hand_repeats_what_follows(tmp_path: Path, ran: Callable[[], list[str]]) -> None:
    settings = settings_of(tmp_path)
    pipeline.run(settings)
    ran()
    record = StageRecord.read(settings.paths.stages, "pretrain")
    assert record is not None
    StageRecord(record.verb, 1.0, time.time(), record.settings, record.figures).write(settings.paths.stages)
    pipeline.run(settings)
    assert ran() == ["sample"]


def test_a_failure_names_stage_and_log_and_the_next_run_goes_on_from_there(
    tmp_path: Path, ran: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = settings_of(tmp_path, "sample.limit=13")
    log = broken.paths.logs / "sample.log"
    with pytest.raises(StageFailed, match=rf"^sample failed \(exit code 9\); .*its log: {log}$"):
        pipeline.run(broken)
    assert ran() == ["world", "pretrain", "sample"]
    partial = broken.paths.samples
    partial.touch()
    with pytest.raises(StageFailed):
        pipeline.run(broken)
    assert ran() == ["sample"]
    assert "sample: step 2: sample K completions of each prompt, going on" in capsys.readouterr().out
    assert partial.exists()
    pipeline.run(settings_of(tmp_path))
    assert ran() == ["sample"]
    assert not partial.exists()


def test_fresh_starts_over_and_touches_nothing_of_others(tmp_path: Path, ran: Callable[[], list[str]]) -> None:
    settings = settings_of(tmp_path)
    pipeline.run(settings)
    notes = settings.paths.folder / "data" / "notes.txt"
    notes.parent.mkdir(exist_ok=True)
    notes.touch()
    ran()
    pipeline.run(settings, fresh=True)
    assert ran() == ["world", "pretrain", "sample"]
    assert notes.exists()


def test_fresh_keeps_what_other_stages_would_have_made(tmp_path: Path) -> None:
    """A person's own data lies where the world's would: a run without `world` must not remove it."""
    settings = settings_of(tmp_path, 'run.stages=["pretrain"]')
    settings.paths.texts.parent.mkdir(parents=True)
    settings.paths.texts.touch()
    settings.paths.pretrained.mkdir()
    clear_all(settings)
    assert settings.paths.texts.exists()
    assert not settings.paths.pretrained.exists()


def test_fresh_refuses_a_folder_that_is_no_run(tmp_path: Path, ran: Callable[[], list[str]]) -> None:
    settings = settings_of(tmp_path)
    settings.paths.pretrained.mkdir(parents=True)
    with pytest.raises(StageFailed, match="is not empty and is no run folder"):
        pipeline.run(settings, fresh=True)
    assert settings.paths.pretrained.exists()
    assert ran() == []


def test_every_stage_has_its_outputs_in_the_run_folder(tmp_path: Path) -> None:
    paths = settings_of(tmp_path).paths
    for stage in ("data", "world", "pretrain", "sft", "sample", "rank", "reward-model", "ppo", "evaluate", "report"):
        assert all(path.is_relative_to(paths.folder) and path != paths.folder for path in outputs(stage, paths))
        assert BY_NAME[stage].kind == "stage"


DEMANDING = ('run.stages=["evaluate"]', "run.min_judge_gain=0.1")


def gain(before: float, after: float, low: float, high: float) -> dict[str, Any]:
    return {"judge_before": before, "judge_after": after, "judge_gain_interval": [low, high]}


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        (gain(0.5, 0.58, 0.05, 0.11), r"rose by 0\.080 .* at least 0\.1 with the interval above 0"),
        (gain(0.5, 0.7, -0.01, 0.4), r"rose by 0\.200 \(95 % interval -0\.010 to 0\.400\)"),
    ],
)
def test_a_judge_that_sees_no_gain_fails_the_run(figures: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match=sentence):
        pipeline.check_gain(figures, settings_of(tmp_path, *DEMANDING))


def test_a_gain_that_no_stage_measures_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match='min_judge_gain needs the stage "evaluate"'):
        settings_of(tmp_path, "run.min_judge_gain=0.1")


def test_a_gain_passes_and_no_condition_asks_for_none(tmp_path: Path) -> None:
    pipeline.check_gain(gain(0.5, 0.7, 0.1, 0.3), settings_of(tmp_path, *DEMANDING))
    pipeline.check_gain(gain(0.5, 0.1, -1, 0), settings_of(tmp_path))


def test_step_three_is_these_processes(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "run.policies=2", "run.workers=2", "policy.port=7101", "reward.host=0.0.0.0")
    children = {child.name: child for child in group(settings)}
    assert list(children) == [
        *("redis", "policy-0", "policy-1", "reward", "reference", "worker-0", "worker-1", "ppo"),
    ]
    assert [children[name].address for name in ("policy-0", "policy-1")] == ["127.0.0.1:7101", "127.0.0.1:7102"]
    assert children["reward"].address.startswith("127.0.0.1:")
    worker = " ".join(children["worker-1"]._command)  # type: ignore[attr-defined]
    assert f"rollouts --config {settings.paths.settings}" in worker
    assert "--set rollouts.policy=127.0.0.1:7101,127.0.0.1:7102" in worker
    assert f"--set rollouts.reward={children['reward'].address}" in worker
    assert "--set rollouts.consumer=worker-1" in worker
    trainer = " ".join(children["ppo"]._command)  # type: ignore[attr-defined]
    assert f"--set ppo.reference={children['reference'].address}" in trainer
    policy = " ".join(children["policy-1"]._command)  # type: ignore[attr-defined]
    assert "--set policy.name=policy-1 --set policy.join_run=true --set policy.advertise=127.0.0.1:7102" in policy
    assert len({child.log for child in children.values()}) == len(children)


def test_a_redis_of_ones_own_is_not_started(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "redis.url=redis://127.0.0.1:6379")
    assert "redis" not in [child.name for child in group(settings)]


def test_children_take_their_settings_from_the_file_alone() -> None:
    environment = child_environment({"RLHF_PPO_STEPS": "3", "RLHF_OTHER": "kept", "HOME": "/h"})
    assert environment == {"RLHF_OTHER": "kept", "HOME": "/h", "PYTHONUNBUFFERED": "1"}


def test_a_port_is_free_until_somebody_listens() -> None:
    import socket

    port = group_module.free_port("127.0.0.1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_redis_comes_back_with_its_data_at_its_address(tmp_path: Path) -> None:
    import redis

    child = RedisChild(tmp_path / "redis", tmp_path / "logs" / "redis.log")
    child.start()
    try:
        address, pid = child.address, child.pid()
        with redis.Redis.from_url(address) as client:
            client.set("key", "value")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while child.exit_status() is None:
            time.sleep(0.01)
        assert not child.ready()
        child.start()
        assert child.address == address
        assert child.pid() != pid
        with redis.Redis.from_url(address) as client:
            assert client.get("key") == b"value"
    finally:
        child.kill()
    assert child.exit_status() is not None


def test_a_redis_that_loads_for_long_keeps_no_signal_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped as soon as it is there, so that it answers as little as one that loads."""
    launch = EmbeddedRedis._launch

    def launch_frozen(self: EmbeddedRedis, server: Server) -> None:
        launch(self, server)
        assert self.pid is not None
        os.kill(self.pid, signal.SIGSTOP)

    monkeypatch.setattr(EmbeddedRedis, "_launch", launch_frozen)
    monkeypatch.setattr(group_module, "START_PATIENCE_S", 0.2)
    child = RedisChild(tmp_path / "redis", tmp_path / "logs" / "redis.log")
    began_s = time.monotonic()
    child.start()
    try:
        assert time.monotonic() - began_s < 5
        assert child.exit_status() is None
        assert not child.ready()
        assert not (tmp_path / "redis" / "address.json").exists()
        pid = child.pid()
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
        deadline_s = time.monotonic() + 20
        while not child.ready():
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert json.loads((tmp_path / "redis" / "address.json").read_text())["url"] == child.address
    finally:
        child.kill()


def test_redis_of_a_run_that_is_over_can_be_asked(tmp_path: Path) -> None:
    from rlhf.queues.connection import connect

    settings = settings_of(tmp_path, "redis.connect_timeout_s=5")
    with pytest.raises(StageFailed, match="has not come to step 3"), redis_at_hand(settings):
        pass
    settings.paths.redis.mkdir(parents=True)
    with redis_at_hand(settings):
        assert connect(settings).ping()
    assert not (settings.paths.redis / "address.json").exists()
