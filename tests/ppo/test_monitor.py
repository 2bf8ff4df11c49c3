"""Faults planted into real rollouts, replicas and models, and seen by the monitor of a real step."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from rlhf.errors import StageFailed
from rlhf.models.tokenizer import train_tokenizer
from rlhf.ppo.invariants import REMEDIES
from rlhf.ppo.monitor import Monitor
from rlhf.settings.run import Settings
from rlhf.wire.records import FinishReason, LogprobMode, Sampling
from support.monitored import NEW_TOKENS, PRESENT, PROMPTS, found_by, models, rollouts_of
from support.rollouts import scored, version
from support.tiny import tiny_lm, tiny_tokenizer


def completions_changed(rollouts, change):
    return [replace(one, completions=tuple(change(completion) for completion in one.completions)) for one in rollouts]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("old_logprobs", ["recompute", "service"])
def test_healthy_rollouts_are_met_with_silence(architecture, temperature, old_logprobs):
    step, monitor = models(temperature, architecture, ppo={"epochs": 1, "old_logprobs": old_logprobs})
    policy = step.learner.policy
    rollouts = rollouts_of(policy, copy.deepcopy(policy), sampling=Sampling(temperature, seed=1))
    assert found_by(step, monitor, rollouts) == {}
    assert monitor._watched.texts > 0
    assert [one.of for one in monitor._watched.policies] == [str(PRESENT)], "they were compared"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_service_in_half_precision_has_its_own_bound(dtype):
    step, monitor = models(0.7, policy={"dtype": dtype})
    policy = copy.deepcopy(step.learner.policy).to(getattr(torch, dtype))
    sampling = Sampling(0.7, seed=1)
    healthy = rollouts_of(policy, copy.deepcopy(step.learner.policy), sampling=sampling)
    raw = rollouts_of(policy, copy.deepcopy(step.learner.policy), sampling=sampling, mode=LogprobMode.RAW)
    before = {name: tensor.clone() for name, tensor in step.learner.policy.state_dict().items()}
    assert found_by(step, monitor, healthy) == {}
    assert monitor._watched.policies[0].largest > 1e-3, "float32's bound would not do"
    step.learner.policy.load_state_dict(before)
    assert "the temperature was forgotten" in found_by(step, monitor, raw)["policy_logprobs"]


def test_dropout_left_on_in_the_trainer():
    step, monitor = models(architecture="gpt2")
    rollouts = rollouts_of(step.learner.policy, copy.deepcopy(step.learner.policy))
    for module in step.learner.policy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    step.learner.policy.train()
    found = found_by(step, monitor, rollouts)
    assert "with recomputed old log-probs it is exactly 0" in found["first_ratio"]
    assert "start_kl" in found


def test_a_service_that_forgets_the_temperature_in_its_logprobs():
    step, monitor = models(temperature=0.7)
    policy = step.learner.policy
    sampling = Sampling(0.7, seed=1)
    rollouts = rollouts_of(policy, copy.deepcopy(policy), sampling=sampling, mode=LogprobMode.RAW)
    found = found_by(step, monitor, rollouts)
    assert found.keys() == {"policy_logprobs"}
    assert "the temperature was forgotten" in found["policy_logprobs"]


def test_a_worker_that_samples_at_another_temperature():
    step, monitor = models(temperature=1.0)
    policy = step.learner.policy
    rollouts = rollouts_of(policy, copy.deepcopy(policy), sampling=Sampling(0.7, seed=1))
    found = found_by(step, monitor, rollouts)
    assert found["sampling"] == "rollouts were sampled with temperature 0.7 in place of 1"
    assert found.keys() == {"sampling", "policy_logprobs", "start_kl"}


def test_a_worker_that_samples_through_top_p():
    step, monitor = models()
    policy = step.learner.policy
    rollouts = rollouts_of(policy, copy.deepcopy(policy), sampling=Sampling(top_p=0.8, seed=1))
    assert found_by(step, monitor, rollouts) == {
        "sampling": "rollouts were sampled with top_p 0.8 in place of 1",
    }


def test_a_service_with_top_p_on_that_says_nothing_of_it():
    step, monitor = models()
    policy = step.learner.policy
    hidden = rollouts_of(
        policy, copy.deepcopy(policy), sampling=Sampling(top_p=0.8, seed=1), mode=LogprobMode.PROCESSED
    )
    found = found_by(step, monitor, [replace(one, sampling=Sampling(seed=1)) for one in hidden])
    assert found.keys() == {"policy_logprobs"}
    assert "top-p" in found["policy_logprobs"]


def test_padding_that_counts_as_sampled():
    step, monitor = models()
    policy = step.learner.policy
    end, pad = tiny_tokenizer().eos_token_id, tiny_tokenizer().pad_token_id

    def padded(completion):
        """As a worker would make it that pads a batch and marks all of it."""
        prompt = completion.token_ids[~completion.response_mask].tolist()
        response = [*completion.token_ids[completion.response_mask][:4].tolist(), end]
        logprobs = [-1.0] * NEW_TOKENS
        ids = prompt + response + [pad] * (NEW_TOKENS - len(response))
        return scored(ids, len(prompt), logprobs=logprobs, ref_logprobs=logprobs, weights=PRESENT)

    rollouts = completions_changed(rollouts_of(policy, policy), padded)
    found = found_by(step, monitor, rollouts, number=2)
    assert found["padding"] == "112 of 192 sampled tokens come after an end token of their completion"


def test_log_probs_that_are_shifted_by_one():
    step, monitor = models()
    policy = step.learner.policy

    def shifted(completion):
        logprobs = completion.logprobs.copy()
        logprobs[completion.response_mask] = np.roll(logprobs[completion.response_mask], 1)
        return replace(completion, logprobs=logprobs)

    rollouts = completions_changed(rollouts_of(policy, copy.deepcopy(policy)), shifted)
    found = found_by(step, monitor, rollouts)
    assert found.keys() == {"policy_logprobs"}
    assert "higher and lower" in found["policy_logprobs"]


def test_stale_weights_under_the_name_of_the_present_ones():
    step, monitor = models()
    reference = copy.deepcopy(step.learner.policy)
    rollouts = rollouts_of(tiny_lm(seed=5), reference)
    found = found_by(step, monitor, rollouts, number=2)
    assert f"the log-probs of {PRESENT} differ" in found["policy_logprobs"]
    assert "other weights" in found["policy_logprobs"]


def test_weights_that_are_said_to_be_older_may_differ():
    step, monitor = models()
    older = replace(version(2), sha256="b" * 64)
    rollouts = completions_changed(
        rollouts_of(tiny_lm(seed=5), copy.deepcopy(step.learner.policy)),
        lambda completion: replace(completion, versions=(replace(completion.versions[0], version=older),)),
    )
    assert "policy_logprobs" not in found_by(step, monitor, rollouts, number=2)


def test_a_restart_that_kept_the_weights_is_compared_too():
    """The same weights have another name in another epoch."""
    step, monitor = models()
    monitor.published(replace(PRESENT, epoch=1), {}, probe=dict)
    rollouts = rollouts_of(tiny_lm(seed=5), copy.deepcopy(step.learner.policy))
    assert "policy_logprobs" in found_by(step, monitor, rollouts, number=2)


def test_a_swapped_tokenizer():
    step, monitor = models()
    policy = step.learner.policy
    other = train_tokenizer(["Quite other words, zigzag, quartz."] * 3, 280)

    def in_other_words(completion):
        ids = completion.token_ids[completion.response_mask].tolist()
        return replace(completion, text=other.decode(ids, skip_special_tokens=True))

    rollouts = completions_changed(rollouts_of(policy, copy.deepcopy(policy)), in_other_words)
    found = found_by(step, monitor, rollouts)
    assert found.keys() == {"tokenizer"}


def test_a_text_cut_at_a_stop_string_is_its_tokens_text():
    step, monitor = models()
    policy = step.learner.policy

    def cut(completion):
        return replace(completion, text=completion.text[:2], finish_reason=FinishReason.STOP_STRING)

    rollouts = completions_changed(rollouts_of(policy, copy.deepcopy(policy)), cut)
    assert found_by(step, monitor, rollouts) == {}


def test_a_reference_that_is_another_model():
    step, monitor = models()
    rollouts = rollouts_of(step.learner.policy, tiny_lm(seed=5))
    assert found_by(step, monitor, rollouts).keys() == {"start_kl"}


def test_a_kl_of_tokens_that_another_policy_sampled():
    """Sampled by the reference, the mean of log π - log π_ref is minus a KL."""
    step, monitor = models()
    reference = tiny_lm(seed=5)
    rollouts = rollouts_of(reference, reference)
    found = found_by(step, monitor, rollouts, number=2)
    assert found["negative_kl"].startswith("the mean KL is -")


def test_a_replica_that_holds_other_weights_is_told_once():
    step, monitor = models()
    policy = step.learner.policy
    monitor.published(PRESENT, {"policy-0": PRESENT, "policy-1": version(2)}, probe=dict)
    rollouts = rollouts_of(policy, copy.deepcopy(policy))
    found = found_by(step, monitor, rollouts)
    assert found == {"replica_weights": f"{PRESENT} was published, and then policy-1 holds {version(2)}"}
    monitor.published(PRESENT, {"policy-0": PRESENT, "policy-1": PRESENT}, probe=dict)
    assert "replica_weights" not in found_by(step, monitor, rollouts, number=2)


def test_a_replica_that_claims_weights_it_does_not_generate_with():
    step, monitor = models(monitor={"probe_every": 3})
    policy = step.learner.policy
    rollouts = rollouts_of(policy, copy.deepcopy(policy))
    honest, lying = (rollouts_of(model, model, prompts=PROMPTS[:1])[0] for model in (policy, tiny_lm(seed=5)))
    monitor.published(PRESENT, {}, probe=lambda: {"policy-0": honest, "policy-1": lying})
    found = found_by(step, monitor, rollouts)
    assert found.keys() == {"policy_logprobs"}
    assert "the log-probs of policy-1 differ" in found["policy_logprobs"]


def test_probes_come_every_few_steps():
    _, monitor = models(monitor={"probe_every": 4})
    asked = []
    for number in range(9):
        monitor.published(version(number), {}, probe=lambda number=number: asked.append(number) or {})
    assert asked == [0, 4, 8]
    _, monitor = models(monitor={"probe_every": 0})
    monitor.published(version(0), {}, probe=lambda: pytest.fail("no probe is wanted"))


def test_figures_of_completions_that_become_alike():
    step, monitor = models()
    policy = step.learner.policy
    various = rollouts_of(policy, copy.deepcopy(policy))
    same = [replace(various[0], prompt_index=n, rollout_id=f"run-1/{n}/0") for n in range(16)]
    shares = []
    for rollouts in (various, same):
        figures, _ = monitor.judge(2, vars(step(rollouts, monitor.look)) | {"staleness_mean": 0.0})
        shares.append(figures["distinct_bigrams"])
    assert shares[0] > 0.5
    assert shares[1] < shares[0] / 4


def test_what_is_found_is_logged_when_it_begins_and_when_it_ends(caplog):
    step, monitor = models()
    policy = step.learner.policy
    healthy, other = (rollouts_of(policy, copy.deepcopy(model)) for model in (policy, tiny_lm(seed=5)))
    with caplog.at_level("INFO", "rlhf.ppo.monitor"):
        for rollouts in (other, other, healthy):
            figures, diagnoses = monitor.judge(1, vars(step(rollouts, monitor.look)))
            monitor.act(figures, [one for one in diagnoses if one.name == "start_kl"])
            step, fresh = models()
            fresh._names = monitor._names
            monitor = fresh
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("start_kl: before the first step, log-probs of policy and reference differ")
    assert messages[0].endswith(REMEDIES["start_kl"])
    assert messages[1] == "start_kl: holds again"


def test_a_diagnosis_that_stops():
    step, monitor = models()
    policy = step.learner.policy
    rollouts = rollouts_of(policy, copy.deepcopy(policy), sampling=Sampling(top_p=0.8, seed=1))
    figures, diagnoses = monitor.judge(1, vars(step(rollouts, monitor.look)))
    with pytest.raises(StageFailed, match=r"sampling: rollouts were sampled with top_p 0\.8.*set monitor\.sampling"):
        monitor.act(figures, diagnoses)


def test_history_is_read_back_from_the_rows_of_a_run():
    rows = [{"step": n, "score_mean": n, "diagnoses": []} for n in range(1, 12)]
    settings = Settings()
    step, _ = models()
    monitor = Monitor(settings, step.learner, tiny_tokenizer(), rows)
    assert [row["score_mean"] for row in monitor._start] == [1, 2, 3, 4, 5]
    assert [row["score_mean"] for row in monitor._recent] == [7, 8, 9, 10, 11]
