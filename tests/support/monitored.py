"""A real step on a tiny policy with its monitor, and what worker and services would make of prompts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import torch

from rlhf.policy.sample import generate
from rlhf.ppo.kl_control import KlController
from rlhf.ppo.learner import Learner
from rlhf.ppo.monitor import Monitor
from rlhf.ppo.step import PpoStep
from rlhf.reference.requests import Item
from rlhf.reference.scorer import ReferenceModel
from rlhf.settings.run import Settings
from rlhf.wire.records import LogprobMode, Sampling, Stopping
from support.rollouts import rollout, scored, version
from support.steps import TinyCritic
from support.tiny import tiny_lm, tiny_tokenizer

PRESENT = replace(version(3), sha256="a" * 64)
PROMPTS = [np.array(ids, np.int32) for ids in ([5, 6, 7], [8, 9], [10, 11, 12, 13], [5, 9])]
NEW_TOKENS = 12
PLAIN = Sampling(seed=1)


def distinct_tokens(response):
    return float(len(set(response)))


def models(temperature=1.0, architecture="llama", *, model=None, **sections):
    """A step on a tiny policy, and its monitor, which knows that its weights are published as PRESENT."""
    settings = Settings.model_validate(
        {"ppo": {"epochs": 1}, "critic": {"kind": "shared"}, "sampling": {"temperature": temperature}, **sections}
    )
    policy = model or tiny_lm(architecture)
    critic = TinyCritic(policy) if settings.critic.kind == "separate" else None
    learner = Learner(
        policy, critic, settings.ppo, settings.critic, settings.kl,
        temperature=temperature, pad_id=tiny_tokenizer().pad_token_id,
    )  # fmt: skip
    monitor = Monitor(settings, learner, tiny_tokenizer())
    monitor.published(PRESENT, {"policy-0": PRESENT}, probe=dict)
    return PpoStep(learner, KlController(settings.kl), torch.Generator().manual_seed(0)), monitor


def rollouts_of(
    policy, reference, *, sampling=PLAIN, mode=LogprobMode.TEMPERATURE, prompts=PROMPTS * 4, reward=distinct_tokens
):
    """What worker and services make of prompts: by the policy's real sampler and the reference's real scorer."""
    stopping = Stopping(max_new_tokens=NEW_TOKENS)
    answers = generate(policy, tiny_tokenizer(), prompts, sampling, stopping, logprob_mode=mode, version=PRESENT)
    scorer = ReferenceModel(reference, model_sha256="", tokenizer_sha256="")
    made = []
    for index, (prompt, (answer,)) in enumerate(zip(prompts, answers, strict=True)):
        sequence = np.concatenate([prompt, answer.token_ids])
        (ref_logprobs,) = scorer.forward([Item(sequence, len(prompt), sampling.temperature)])
        completion = scored(
            sequence.tolist(), len(prompt), score=reward(answer.token_ids.tolist()), weights=PRESENT,
            logprobs=answer.logprobs.tolist(), ref_logprobs=ref_logprobs.tolist(), finish_reason=answer.finish_reason,
        )  # fmt: skip
        made.append(replace(rollout(index, replace(completion, text=answer.text)), sampling=sampling))
    return made


def found_by(step, monitor, rollouts, number=1):
    """What the monitor says of a step on these, by name; the step becomes part of its history."""
    figures = vars(step(rollouts, monitor.look)) | {"staleness_mean": 0.0}
    figures, diagnoses = monitor.judge(number, {name: value for name, value in figures.items() if value is not None})
    json.dumps(figures, allow_nan=False)
    monitor._remember(figures, {diagnosis.name for diagnosis in diagnoses})
    return {diagnosis.name: diagnosis.what for diagnosis in diagnoses}
