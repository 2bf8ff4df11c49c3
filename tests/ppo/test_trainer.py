"""The trainer against a real Redis: to the end, through failures, and through kills."""

import errno
import json
import shutil
import signal
import time

import pytest

from rlhf.errors import DataError, DeadlineExceeded, ModelError, SettingsError, StageFailed, StorageError
from rlhf.models.causal import load_causal_lm
from rlhf.ppo import audit, intake, loop
from rlhf.ppo.checkpoint import checkpoints
from rlhf.ppo.learner import Learner
from rlhf.ppo.settings import CriticSettings, PpoSettings
from rlhf.queues.connection import connect
from rlhf.queues.keys import RunKeys
from rlhf.settings.run import Settings
from support.answering import AnsweringWorker
from support.tiny import tiny_lm_folder, tiny_reward_folder
from support.trainers import start_trainer


@pytest.fixture
def settings(tmp_path, run_name, redis_settings):
    made = Settings.model_validate(
        {
            "run": {"name": run_name, "folder": tmp_path},
            "redis": redis_settings.model_dump(),
            "ppo": {
                "steps": 6,
                "batch_prompts": 4,
                "epochs": 1,
                "completions": 2,
                "checkpoint_every": 2,
                "sample_every": 3,
                "rollout_timeout_s": 20.0,
                "threads": 1,
            },
            "sampling": {"max_new_tokens": 8},
        }
    )
    tiny_lm_folder(made.paths.pretrained)
    tiny_reward_folder(made.paths.reward_model)
    write_prompts(made, ["A fine", "The plot", "I liked"])
    return made


def write_prompts(settings, prompts):
    settings.paths.prompts.parent.mkdir(parents=True, exist_ok=True)
    settings.paths.prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))


def changed(settings, **ppo):
    return settings.model_copy(update={"ppo": settings.ppo.model_copy(update=ppo)})


@pytest.fixture
def worker(settings):
    fails = {"rule": lambda task: None}
    answering = AnsweringWorker(connect(settings), settings.run.name, settings.redis, lambda task: fails["rule"](task))
    answering.fail_by = lambda rule: fails.update(rule=rule)
    answering.start()
    yield answering
    answering.stop()


def metrics(settings):
    return [json.loads(line) for line in settings.paths.metrics.read_text().splitlines()]


def test_a_run_from_start_to_end(settings, worker):
    figures = loop.run(settings)
    assert (figures["steps"], figures["rollouts"], figures["dead"]) == (6, 24, 0)
    assert [row["step"] for row in metrics(settings)] == [1, 2, 3, 4, 5, 6]
    assert all(row["first_ratio_error"] == 0.0 for row in metrics(settings))
    assert [path.name for path in checkpoints(settings.paths.checkpoints)] == ["2-4", "4-6"]
    assert [path.name for path in sorted(settings.paths.sample_tables.iterdir())] == [
        "step-000003.jsonl",
        "step-000006.jsonl",
    ]
    trained, start = load_causal_lm(settings.paths.policy), load_causal_lm(settings.paths.pretrained)
    moved = [not a.equal(b) for a, b in zip(trained.parameters(), start.parameters(), strict=True)]
    assert any(moved)
    assert audit.run(settings)["trained"] == 24
    again = loop.run(settings)
    assert again["rollouts"] == 24, "a finished run has nothing more to do"


def test_failed_prompts_go_out_again_and_the_audit_counts_them(settings, worker):
    worker.fail_by(lambda task: "it raised" if task.prompt_index % 5 == 0 and task.attempt == 0 else None)
    figures = loop.run(settings)
    assert figures["rollouts"] == 24
    assert figures["dead"] > 0
    assert audit.run(settings)["dead"] == figures["dead"]


def test_a_rule_that_always_fails_ends_the_run_with_its_reason(settings, worker):
    worker.fail_by(lambda task: "rule my.py:score raised ValueError")
    with pytest.raises(StageFailed, match=r"prompts failed.*my\.py:score raised ValueError"):
        loop.run(settings)


def test_without_workers_the_wait_has_an_end(settings):
    with pytest.raises(DeadlineExceeded, match="the step has 0 of 4"):
        loop.run(changed(settings, rollout_timeout_s=1.5))


def test_stale_rollouts_are_counted_and_issued_again(settings, worker):
    """Workers that answer with weights from before the last publish, once per prompt."""
    current = worker.registry.current
    first = {}

    def older():
        found = current()
        first.setdefault("current", found)
        return first["current"] if worker.random.random() < 0.3 else found

    worker.registry.current = older
    figures = loop.run(settings)
    assert figures["rollouts"] == 24
    assert figures["stale"] > 0
    assert audit.run(settings)["stale"] == figures["stale"]


def wait_for_step(settings, step, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if settings.paths.metrics.exists() and len(metrics(settings)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def kill(trainer):
    trainer.kill()
    trainer.join(20)
    assert trainer.exitcode == -signal.SIGKILL


def test_killed_trainers_go_on_with_nothing_trained_twice(settings, worker):
    settings = changed(settings, steps=12, checkpoint_every=4)
    for step in (3, 6):
        trainer = start_trainer(settings)
        wait_for_step(settings, step)
        kill(trainer)
    trainer = start_trainer(settings)
    trainer.join(90)
    assert trainer.exitcode == 0
    counts = audit.run(settings)
    assert counts["trained"] == 48
    assert counts["outstanding"] == 0


def test_sigterm_saves_and_says_that_it_is_not_finished(settings, worker):
    settings = changed(settings, steps=1000, checkpoint_every=1000)
    trainer = start_trainer(settings)
    wait_for_step(settings, 3)
    trainer.terminate()
    trainer.join(20)
    assert trainer.exitcode == loop.STOPPED
    assert int(checkpoints(settings.paths.checkpoints)[-1].name.split("-")[1]) >= 3


def test_an_altered_checkpoint_is_refused(settings, worker):
    loop.run(settings)
    tensors = checkpoints(settings.paths.checkpoints)[-1] / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(ModelError, match="altered"):
        loop.run(settings)


def test_the_audit_finds_a_rollout_trained_twice_and_a_missing_one(settings, worker):
    loop.run(settings)
    rows = audit.read_log(settings.paths.trained)
    rows[1]["rollout_ids"][0] = rows[0]["rollout_ids"][0]
    settings.paths.trained.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(StageFailed, match="trained twice"):
        audit.run(settings)


def test_two_trainers_on_one_folder_are_refused(settings, worker):
    with loop._only_trainer(settings.paths.checkpoints), pytest.raises(StageFailed, match="another trainer"):
        loop.run(settings)


def test_a_prompt_longer_than_the_context_is_named(settings):
    write_prompts(settings, ["A fine", "long " * 200])
    with pytest.raises(DataError, match=r"prompt 2 has \d+ tokens"):
        loop.run(settings)


def test_a_stream_too_small_for_a_batch_is_refused(settings):
    small = settings.model_copy(update={"redis": settings.redis.model_copy(update={"max_entries": 6})})
    with pytest.raises(SettingsError, match=r"redis\.max_entries: 6 is too small"):
        loop.run(small)


def test_staleness_lets_generation_run_ahead(settings, worker):
    settings = changed(settings, max_staleness=1, old_logprobs="service")
    assert loop.run(settings)["rollouts"] == 24
    assert audit.run(settings)["trained"] == 24


def test_a_rollout_that_cannot_be_used_is_issued_again_also_after_a_kill(settings, worker):
    """The dead letter lies in the rollouts stream; a trainer that never saw it die must find it there."""
    settings = changed(settings, steps=4, checkpoint_every=100)
    enqueue = worker.rollouts.enqueue

    def spoil_first(item_id, payload):
        return enqueue(item_id, b"no rollout" if item_id.endswith("/2/0") else payload)

    worker.rollouts.enqueue = spoil_first
    trainer = start_trainer(settings)
    wait_for_step(settings, 2)
    kill(trainer)
    assert loop.run(settings)["dead"] == 1
    assert audit.run(settings)["trained"] == 16


def test_an_entry_that_somebody_else_wrote_harms_nobody(settings, worker):
    for queue in (worker.rollouts, worker.prompts):
        connect(settings).xadd(queue.keys.stream, {"hello": "world"})
    assert loop.run(settings)["rollouts"] == 24
    assert worker.prompts.counts().dead == worker.rollouts.counts().dead == 1


def test_what_redis_lost_is_sent_again(settings, worker, monkeypatch):
    """As after a kill on a slow disk, only worse: both streams are gone with all that they remember."""
    monkeypatch.setattr(intake, "SEND_AGAIN_S", 1.0)
    client = connect(settings)
    # At one instant, as a server's log is cut: an entry without the key that remembers it, or the key without the
    # entry, is nothing that Redis can lose.
    cut = """
        local lost = 0
        for _, key in ipairs(redis.call('KEYS', ARGV[1])) do
          if key ~= KEYS[1] then lost = lost + redis.call('DEL', key) end
        end
        return lost
    """
    lost = []

    def lose(task):
        if task.prompt_index == 9 and not lost:
            queues = f"{RunKeys(settings.run.name).prefix}q:*"
            lost.append(client.eval(cut, 1, worker.rollouts.keys.fence, queues))

    worker.fail_by(lose)
    assert loop.run(settings)["rollouts"] == 24
    assert lost[0] > 5


def test_the_audit_finds_a_rollout_acknowledged_without_an_outcome(settings, worker):
    loop.run(settings)
    worker.rollouts.enqueue("of nobody", b"x")
    worker.rollouts.acknowledge(worker.rollouts.consume("trainer-0", 1, 1.0))
    with pytest.raises(StageFailed, match="25 acknowledged rollouts are among the ledger's 24"):
        audit.run(settings)


def test_a_row_cut_by_a_kill_does_not_spoil_the_next(settings, worker):
    settings = changed(settings, steps=4)
    loop.run(settings)
    with open(settings.paths.trained, "a") as file:
        file.write('{"epoch": 0, "step": 5, "rollo')
    loop.run(changed(settings, steps=6))
    assert audit.run(settings)["trained"] == 24


def test_a_linear_schedule_falls_to_zero(settings, worker, monkeypatch):
    factors = []
    monkeypatch.setattr(Learner, "set_learning_rates", lambda self, factor: factors.append(factor))
    loop.run(changed(settings, steps=4, lr_schedule="linear"))
    assert factors == [1.0, 0.75, 0.5, 0.25]


def test_a_run_without_a_critic_needs_no_reward_model_and_says_nothing_of_values(settings, worker):
    shutil.rmtree(settings.paths.reward_model)
    settings = changed(settings, estimator="rloo", steps=4)
    loop.run(changed(settings, steps=2))
    loop.run(settings)  # goes on from a checkpoint without a critic
    assert audit.run(settings)["trained"] == 16
    assert [row["step"] for row in metrics(settings)] == [1, 2, 3, 4]
    for row in metrics(settings):
        assert row["policy_grad_norm"] > 0
        assert not {"value_loss", "explained_variance", "critic_grad_norm", "importance_mean"} & row.keys()


def test_the_policy_stands_still_while_the_critic_warms_up(settings, worker):
    settings = settings.model_copy(update={"critic": CriticSettings(warmup_steps=2)})
    loop.run(changed(settings, steps=3))
    moved = [row["policy_grad_norm"] > 0 for row in metrics(settings)]
    assert moved == [False, False, True]


def test_staleness_is_counted_by_steps(settings, worker):
    settings = changed(settings, max_staleness=2, objective="decoupled")
    loop.run(settings)
    for row in metrics(settings):
        counts = [row[f"staleness_{steps}"] for steps in range(3)]
        assert sum(counts) == 4
        assert row["staleness_mean"] == pytest.approx((counts[1] + 2 * counts[2]) / 4)
        assert row["importance_mean"] > 0
    assert sum(row["staleness_0"] for row in metrics(settings)) < 24, "generation overlapped training"


def test_a_full_disk_ends_the_run_and_loses_nothing(settings, worker, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rlhf.models.training_state.save_file", full)
        with pytest.raises(StorageError, match="No space left"):
            loop.run(settings)
    assert loop.run(settings)["rollouts"] == 24
    assert audit.run(settings)["trained"] == 24


def test_filters_are_refused_because_ppo_needs_the_policy_as_it_is(settings):
    filtered = settings.model_copy(update={"sampling": settings.sampling.model_copy(update={"top_p": 0.9})})
    with pytest.raises(SettingsError, match=r"sampling\.top_p: .* 1\.0 is needed; 0\.9 received"):
        loop.run(filtered)


def test_a_critic_with_a_shorter_context_is_refused(settings, tmp_path):
    tiny_lm_folder(tmp_path / "long", context=256)
    longer = changed(settings, model=tmp_path / "long")
    longer = longer.model_copy(update={"sampling": settings.sampling.model_copy(update={"max_new_tokens": 200})})
    with pytest.raises(SettingsError, match="do not fit into the critic's context of 64"):
        loop.run(longer)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="float16 gradients underflow"):
        PpoSettings(dtype="float16")


def monitored(settings, **monitor):
    return settings.model_copy(update={"monitor": settings.monitor.model_copy(update=monitor)})


def test_what_the_monitor_finds_is_in_the_metrics(settings, worker):
    """The worker's log-probs are made up, and so are its reference's."""
    loop.run(settings)
    rows = metrics(settings)
    assert all(diagnosis["severity"] == "warn" for row in rows for diagnosis in row["diagnoses"])
    names = [{diagnosis["name"] for diagnosis in row["diagnoses"]} for row in rows]
    assert names[0] >= {"policy_logprobs", "start_kl"}
    assert all("policy_logprobs" in found and "start_kl" not in found for found in names[1:])
    assert 0 < rows[0]["distinct_bigrams"] <= 1


def test_a_diagnosis_stops_the_run_before_its_next_checkpoint(settings, worker):
    settings = changed(settings, checkpoint_every=1)
    with pytest.raises(StageFailed, match=r"^policy_logprobs: .* set monitor\.policy_logprobs to warn"):
        loop.run(monitored(settings, policy_logprobs="stop"))
    assert [path.name for path in checkpoints(settings.paths.checkpoints)] == ["0-0"]
    assert [row["step"] for row in metrics(settings)] == [1], "the step that stopped it can be looked at"
    assert loop.run(monitored(settings, policy_logprobs="off"))["rollouts"] == 24
    assert all(diagnosis["name"] != "policy_logprobs" for row in metrics(settings) for diagnosis in row["diagnoses"])
    assert audit.run(settings)["trained"] == 24
