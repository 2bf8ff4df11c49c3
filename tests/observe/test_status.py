import json
from pathlib import Path

import pytest

from rlhf.observe.status import run
from rlhf.observe.waits import waits
from rlhf.queues.connection import open_client
from rlhf.queues.deliveries import QueueCounts, QueueDepth
from rlhf.queues.registry import Beat, Replica, open_registry
from rlhf.queues.settings import RedisSettings
from rlhf.queues.streams import prompts_queue
from rlhf.settings.loader import load_settings
from rlhf.settings.run import Settings
from rlhf.supervisor.lock import run_lock
from rlhf.wire.records import WeightVersion

OLD, NEW = WeightVersion("r", 0, 4, "a" * 64), WeightVersion("r", 0, 5, "b" * 64)
TRAINER = {
    "doing": "waiting for rollouts",
    "step": 5,
    "steps": 40,
    "epoch": 0,
    "rollouts_ready": 52,
    "rollouts_needed": 64,
    "prompts_out": 12,
    "stale": 1,
    "dead": 0,
    "kl_coef": 0.1,
}


def settings_of(folder: Path, *overrides: str) -> Settings:
    return load_settings(overrides=[f"run.folder={folder}", "redis.connect_timeout_s=1", *overrides])


def depth(entries: int = 0, pending: int = 0) -> QueueDepth:
    return QueueDepth(entries, 0, pending, 0.0, 0, QueueCounts(added=entries, acknowledged=0, dead=0, lost=0))


def replica(name: str, ready: bool) -> Replica:
    return Replica(name, "127.0.0.1:1", NEW, None, ready)


def beat(service: str, name: str, **fields: object) -> Beat:
    return Beat(service, name, fields, 0.1)


def test_what_waits_for_what() -> None:
    beats = [
        beat("ppo", "trainer-0", **TRAINER),
        beat("rollouts", "worker-0", in_hand=12, stages={"scoring": 2, "generating": 10}),
        beat("rollouts", "worker-1", in_hand=0, stages={}),
    ]
    assert waits(beats, depth(12, 12), [replica("policy-0", True)]) == [
        "the trainer waits for 12 of 64 rollouts",
        "worker-0 has 12 prompts in hand: 10 generating, 2 scoring",
        "worker-1 waits for prompts from the trainer",
    ]
    assert (
        waits(beats, depth(12, 12), [replica("policy-0", False)])[-1] == "no policy is ready: 10 prompts wait for one"
    )


def test_what_is_missing_is_said() -> None:
    training = beat("ppo", "trainer-0", **{**TRAINER, "doing": "saving a checkpoint"})
    assert waits([training], depth(3), [replica("policy-0", True)]) == [
        "the trainer is saving a checkpoint",
        "no rollout worker reports, and 3 prompts wait for one",
    ]
    idle = beat("rollouts", "worker-0", in_hand=0, stages={})
    assert waits([idle], depth(), []) == [
        "no trainer reports: nothing asks for rollouts",
        "worker-0 waits for prompts, which no trainer sends",
        "no policy is ready",
    ]


def test_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(tmp_path, "run.name=one")
    run(settings)
    nothing = "step 3 does not run: no trainer, worker or policy reports\n"
    assert capsys.readouterr().out == f"run one: there is no {settings.paths.folder}\n{nothing}"
    settings.paths.redis.mkdir(parents=True)
    (settings.paths.redis / "address.json").write_text('{"url": "unix:///left/by/a/supervisor/that/was/killed"}')
    settings.paths.stages.mkdir(parents=True)
    record = {"verb": "world", "seconds": 1.0, "finished_unix_s": 1.0, "settings": {}, "figures": {}}
    (settings.paths.stages / "world.json").write_text(json.dumps(record))
    run(settings)
    assert capsys.readouterr().out == f"run one: no supervisor runs; done: world\n{nothing}"


def test_a_run_under_way(
    tmp_path: Path,
    embedded_redis: str,
    redis_settings: RedisSettings,
    run_name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = settings_of(tmp_path, f"run.name={run_name}", f"redis.url={embedded_redis}")
    client = open_client(embedded_redis, redis_settings)
    registry = open_registry(client, run_name, redis_settings)
    registry.register(Replica("policy-0", "127.0.0.1:7101", NEW, None, True))
    registry.register(Replica("policy-1", "127.0.0.1:7102", OLD, NEW, False))
    registry.advance(NEW, "/somewhere", None)
    registry.beat("ppo", "trainer-0", TRAINER)
    registry.beat("rollouts", "worker-0", {"in_hand": 12, "stages": {"generating": 12}})
    prompts_queue(client, run_name, redis_settings).enqueue("one", b"x" * 2048)
    settings.paths.folder.mkdir(parents=True)
    found = {"name": "length", "severity": "warn", "what": "it grew", "remedy": "Read [the] samples"}
    rows = [{"step": 4, "staleness_mean": 9, "diagnoses": [found]}, {"step": 5, "staleness_mean": 0.5}]
    settings.paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step"')
    process = {"name": "ppo", "state": "ready", "pid": 4711, "restarts": 2, "address": "", "log": "/logs/ppo.log"}
    settings.paths.processes.write_text(json.dumps([process]))
    with run_lock(settings.paths.lock):
        run(settings)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith(f"run {run_name}: ppo, under process ")
    assert "ppo ready 4711 2" in lines
    assert any(line.startswith("prompts 1 0 ") and line.endswith(" s 2 0") for line in lines)
    assert "policy-0 127.0.0.1:7101 r/0-5/bbbbbbbb ready" in lines
    assert "policy-1 127.0.0.1:7102 r/0-4/aaaaaaaa r/0-5/bbbbbbbb not ready" in lines
    assert lines[-4:] == [
        "step 5 of 40 in epoch 0; staleness 0.5 steps; 1 stale, 0 dead; current weights r/0-5/bbbbbbbb",
        "the trainer waits for 12 of 64 rollouts",
        "worker-0 has 12 prompts in hand: 12 generating",
        "warn: length (step 4, holds again): it grew. Read [the] samples",
    ]
